#!/usr/bin/env python3
"""Checks every vector beside this file by the text of SPEC.md alone.

Written from the specification and not from the code, with nothing but Python's standard library, so
that an error in either shows as a disagreement. Rule numbers are those of SPEC.md.
"""

import hashlib
import hmac
import json
import math
import pathlib
import re
import struct
import sys

HERE = pathlib.Path(__file__).parent
SEQ_MAX = (1 << 63) - 1
MONO_MAX = 1 << 53
UTC_MIN, UTC_MAX = -62_135_596_800_000_000, 253_402_300_799_999_999


class Refusal(Exception):
    """A message that is not valid, with the class 3 code it would be refused with."""

    def __init__(self, code, why=""):
        super().__init__(f"{code} {why}")
        self.code = code


# ---- section 2: frames


def crc(data, width, poly, initial):
    """Bit by bit, reflected in and out, inverted at the end."""
    reflected = int(f"{poly:0{width}b}"[::-1], 2)
    value = initial
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (reflected if value & 1 else 0)
    return value ^ ((1 << width) - 1)


def crc16(data):
    return crc(data, 16, 0x3D65, 0)


def crc32c(data):
    return crc(data, 32, 0x1EDC6F41, 0xFFFFFFFF)


def frame(data, limit):
    """Ends a fault of framing by its name, else gives (version, type, flags, seq, payload, intact)."""
    if data and data[0] != 0xA7:
        return "magic"
    if len(data) < 16:
        return "incomplete"
    _, version, kind, flags, length, seq, check = struct.unpack("<BBBBHQH", data[:16])
    if crc16(data[:14]) != check:
        return "header"
    if 20 + length > limit:
        return "too large"
    if len(data) < 20 + length:
        return "incomplete"
    (check,) = struct.unpack("<I", data[16 + length : 20 + length])
    return version, kind, flags, seq, data[16 : 16 + length], crc32c(data[: 16 + length]) == check


# ---- section 3: encoding


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        if self.at + count > len(self.data):
            raise Refusal(30, "cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def u8(self):
        return self.take(1)[0]

    def i8(self):
        return struct.unpack("<b", self.take(1))[0]

    def varint(self, bits):
        value = 0
        for i in range((bits + 6) // 7):
            byte = self.u8()
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                if value >> bits or (byte == 0 and i > 0):
                    raise Refusal(30, "R20 or R22")
                return value
        raise Refusal(30, "R20: too many bytes")

    def u16(self):
        return self.varint(16)

    def u32(self):
        return self.varint(32)

    def u64(self):
        return self.varint(64)

    def i64(self):
        return unzigzag(self.varint(64))

    def bytes(self):
        return self.take(self.u64())

    def text(self):
        try:
            return self.bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise Refusal(30, "R20: UTF-8") from None

    def end(self):
        if self.at != len(self.data):
            raise Refusal(30, "R21")


def unzigzag(value):
    return -(value + 1) // 2 if value & 1 else value // 2


def zigzag(value):
    return 2 * value if value >= 0 else -2 * value - 1


def wrap(value):
    """To 64 bits, two's complement."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# ---- section 4: messages. A field's check runs once the whole message is decoded (R44).


def within(test):
    def check(value, fields):
        if not test(value, fields):
            raise Refusal(33, "R24")

    return check


def top(limit):
    return within(lambda value, fields: value <= limit)


def utc(value, fields):
    if not UTC_MIN <= value <= UTC_MAX:
        raise Refusal(33, "R50")


def text_to(limit, empty_ok=True):
    def check(value, fields):
        if not empty_ok and not value:
            raise Refusal(30, "R23")
        if len(value.encode()) > limit:
            raise Refusal(33, "R23")
        if "\0" in value:
            raise Refusal(30, "R23")

    return check


def name(value, fields):
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-")
    if not 1 <= len(value) <= 32 or not set(value) <= allowed:
        raise Refusal(30, "R31")


def ext(value, fields):
    rest = value
    while rest:
        if len(rest) < 2:
            raise Refusal(30, "R25")
        tag, length = rest[0], rest[1]
        if tag % 2 == 0:
            raise Refusal(34, "R26")
        if len(rest) < 2 + length:
            raise Refusal(30, "R25")
        rest = rest[2 + length :]


def event_time(value, fields):
    low, high = (UTC_MIN, UTC_MAX) if fields["clock"] else (0, MONO_MAX)
    if not low <= value <= high:
        raise Refusal(33, "R50")


def channels(value, fields):
    if not value:
        raise Refusal(30, "R42")
    ids, names = set(), set()
    for channel in value:
        text_to(32, empty_ok=False)(channel["name"], fields)
        text_to(16)(channel["unit"], fields)
        if channel["kind"] > 3:
            raise Refusal(30, "R43")
        if not -22 <= channel["exp10"] <= 22 or (channel["kind"] and channel["exp10"]):
            raise Refusal(30, "R43")
        if channel["id"] in ids or channel["name"] in names:
            raise Refusal(30, "R42")
        ids.add(channel["id"])
        names.add(channel["name"])


CHANNEL = [("id", "u8"), ("name", "text"), ("unit", "text"), ("kind", "u8"), ("exp10", "i8")]
COLUMN = [("channel", "u8"), ("encoding", "u8"), ("nulls", "bytes"), ("data", "bytes")]
EXT = ("ext", "bytes", ext)
MESSAGES = {
    0x01: [
        ("min_version", "u8", within(lambda v, f: v <= f["max_version"])),
        ("max_version", "u8"),
        ("name", "text", name),
        ("stream", "u64", top(SEQ_MAX)),
        ("oldest_seq", "u64", within(lambda v, f: 1 <= v <= f["next_seq"])),
        ("next_seq", "u64", within(lambda v, f: 1 <= v <= SEQ_MAX)),
        ("boot", "u32"),
        ("mono_us", "u64", top(MONO_MAX)),
        ("utc_us", "i64"),
        ("rx_bytes_max", "u16"),
        ("firmware", "text", text_to(32)),
        ("schema", "u16"),
        ("schema_hash", 8),
        ("nonce", 16),
        ("caps", "u32"),
        EXT,
    ],
    0x02: [("version", "u8"), ("nonce", 16), ("rx_bytes_max", "u16"), ("caps", "u32"), EXT],
    0x03: [("mono_us", "u64", top(MONO_MAX)), EXT, ("mac", 32)],
    0x04: [
        ("durable_seq", "u64"),
        ("limit_seq", "u64", within(lambda v, f: v >= f["durable_seq"])),
        ("keepalive_s", "u16", within(lambda v, f: v >= 1)),
        ("ack_timeout_s", "u16", within(lambda v, f: v >= 1)),
        ("utc_us", "i64", utc),
        ("schema_known", "u8", top(1)),
        EXT,
        ("mac", 32),
    ],
    0x08: [
        ("schema", "u16", within(lambda v, f: v >= 1)),
        ("channels", CHANNEL, channels),
        EXT,
    ],
    0x11: [
        ("schema", "u16"),
        ("clock", "u8", top(1)),
        ("time_unit", "u8", top(2)),
        ("boot", "u32"),
        ("t0", "i64"),
        ("rows", "u16"),
        ("step", "u32"),
        ("dt", "bytes"),
        ("columns", COLUMN),
        EXT,
    ],
    0x12: [("from_seq", "u64", within(lambda v, f: v >= 1)), ("reason", "u8"), EXT],
    0x13: [("id", "u64"), ("status", "u8", top(3)), ("body", "bytes"), EXT],
    0x14: [
        ("clock", "u8", top(1)),
        ("boot", "u32"),
        ("time_us", "i64", event_time),
        ("level", "u8", top(4)),
        ("code", "u16"),
        ("text", "text", text_to(128)),
        EXT,
    ],
    0x20: [("limit_seq", "u64"), EXT],
    0x21: [
        ("code", "u8"),
        ("expected_seq", "u64"),
        ("retry_after_ms", "u32"),
        ("detail", "text", text_to(96)),
        EXT,
    ],
    0x30: [("id", "u64"), ("ttl_ms", "u32"), ("kind", "u16"), ("body", "bytes"), EXT],
    0x40: [
        ("mono_us", "u64", top(MONO_MAX)),
        ("pong_sent_us", "i64", utc),
        ("pong_mono_us", "u64", within(lambda v, f: v <= f["mono_us"])),
        EXT,
    ],
    0x41: [("mono_us", "u64"), ("received_us", "i64", utc), ("sent_us", "i64", utc), EXT],
    0x7F: [
        ("code", "u8"),
        ("retry_after_ms", "u32"),
        ("min_version", "u8"),
        ("max_version", "u8"),
        ("detail", "text", text_to(96)),
        EXT,
    ],
}


def read_fields(reader, layout):
    fields = {}
    for key, kind, *_ in layout:
        if isinstance(kind, int):
            fields[key] = reader.take(kind)
        elif isinstance(kind, list):
            count = reader.u64()
            if count > 32:
                raise Refusal(30, "R20: list")
            fields[key] = [read_fields(reader, kind) for _ in range(count)]
        else:
            fields[key] = getattr(reader, kind)()
    return fields


def message(kind, payload):
    reader = Reader(payload)
    fields = read_fields(reader, MESSAGES[kind])
    reader.end()
    for key, _, *checks in MESSAGES[kind]:
        for check in checks:
            check(fields[key], fields)
    return fields


# ---- section 7: readings


def decode_times(data):
    if not 1 <= data["rows"] <= 4096:
        raise Refusal(33, "R52")
    unit = (1, 1_000, 1_000_000)[data["time_unit"]]
    reader = Reader(data["dt"])
    times = [data["t0"] * unit]
    low, high = (UTC_MIN, UTC_MAX) if data["clock"] else (0, MONO_MAX)
    try:
        for _ in range(data["rows"] - 1):
            step = data["step"] or reader.u64()
            if step == 0:
                raise Refusal(31, "R51")
            times.append(times[-1] + step * unit)
            # Which of two faults is told first does not matter to the vectors, but for this one.
            if times[-1] > (1 << 63) - 1:
                raise OverflowError
        reader.end()
    except OverflowError:
        raise Refusal(33, "R50") from None
    except Refusal:
        raise Refusal(31, "R51") from None
    if times[0] < low or times[-1] > high:
        raise Refusal(33, "R50")
    return times


def scaled(raw, exp10):
    value = float(raw)
    return value / float(10**-exp10) if exp10 < 0 else value * float(10**exp10)


def raw_integers(column, kind, count):
    """The integers of a column of integers or bools."""
    data, encoding = column["data"], column["encoding"]
    if encoding == 0:
        width = 1 if kind == 3 else 8
        if len(data) != width * count:
            raise Refusal(31, "R55")
        return list(data) if kind == 3 else list(struct.unpack(f"<{count}q", data))
    reader, value, out = Reader(data), 0, []
    if encoding == 1:
        for _ in range(count):
            value = wrap(value + reader.i64())
            out.append(value)
        reader.end()
        return out
    if count == 0:
        reader.end()
        return []
    value = reader.i64()
    width = reader.u8()
    if width > 64:
        raise Refusal(31, "R55")
    packed = reader.take((width * (count - 1) + 7) // 8)
    reader.end()
    bits = int.from_bytes(packed, "little")
    out.append(value)
    for _ in range(count - 1):
        value = wrap(value + unzigzag(bits & ((1 << width) - 1)))
        bits >>= width
        out.append(value)
    if bits:
        raise Refusal(31, "R55: spare bits")
    return out


def decode_column(column, kind, exp10, rows):
    """Values, None for NULL."""
    bitmap = column["nulls"]
    if bitmap and (len(bitmap) != (rows + 7) // 8 or int.from_bytes(bitmap, "little") >> rows):
        raise Refusal(31, "R56")
    nulls = int.from_bytes(bitmap, "little")
    count = rows - bin(nulls).count("1")
    if column["encoding"] > 2 or (column["encoding"] and kind in (1, 2)):
        raise Refusal(31, "R54")
    try:
        if kind in (1, 2):
            form, width = ("f", 4) if kind == 1 else ("d", 8)
            if len(column["data"]) != width * count:
                raise Refusal(31, "R55")
            values = list(struct.unpack(f"<{count}{form}", column["data"]))
        else:
            values = raw_integers(column, kind, count)
            if kind == 3 and not set(values) <= {0, 1}:
                raise Refusal(31, "R58")
            values = [scaled(value, exp10) for value in values]
    except Refusal:
        raise Refusal(31, "R55") from None
    values = iter(values)
    out = [None if nulls >> row & 1 else next(values) for row in range(rows)]
    return [None if value is not None and math.isnan(value) else value for value in out]


def check_readings(data, schemas):
    if data["schema"] not in schemas:
        raise Refusal(20, "R47")
    if not 1 <= data["rows"] <= 4096 or data["rows"] * len(data["columns"]) > 8192:
        raise Refusal(33, "R52")
    ids = [column["channel"] for column in data["columns"]]
    if not ids or len(set(ids)) != len(ids):
        raise Refusal(31, "R53")
    decode_times(data)
    known = {channel["id"]: channel for channel in schemas[data["schema"]]["channels"]}
    for column in data["columns"]:
        if column["channel"] not in known:
            raise Refusal(31, "R53")
        channel = known[column["channel"]]
        decode_column(column, channel["kind"], channel["exp10"], data["rows"])


# ---- sections 10 and 11: what each side makes of a frame


def bye(code):
    return {"outcome": "bye", "code": code}


def nack(code, seq, expected):
    consumed = code >= 30
    return {
        "outcome": "nack",
        "code": code,
        "seq": seq,
        "expected_seq": seq + 1 if consumed else expected,
        "consumed": consumed,
    }


TAKEN, DROPPED = {"outcome": "taken"}, {"outcome": "dropped"}
CLOSE, PASSED = {"outcome": "close"}, {"outcome": "passed_over"}


def judge(state, data, serving):
    before = state in ("await_hello", "await_auth")
    found = frame(data, 512 if before else 4096)
    if found == "incomplete":
        return {"outcome": "incomplete"}
    if isinstance(found, str):
        codes = {"header": bye(46), "too large": bye(45), "magic": CLOSE}
        return CLOSE if state == "device" else codes[found]
    version, kind, flags, seq, payload, intact = found
    if kind >= 0x80 and intact:
        return PASSED
    if kind >= 0x80 and state.startswith("serving"):
        return nack(22, 0, serving["expected_seq"])
    if state == "device":
        return judge_device(version, kind, flags, payload, intact)
    if before:
        return judge_handshake(state, version, kind, flags, seq, payload, intact)
    return judge_serving(state, found, serving)


def judge_device(version, kind, flags, payload, intact):
    if not intact or version != 1 or flags or kind not in (0x02, 0x04, 0x20, 0x21, 0x41, 0x7F):
        return CLOSE
    try:
        fields = message(kind, payload)
    except Refusal:
        return CLOSE
    return CLOSE if kind == 0x02 and fields["version"] != 1 else TAKEN


def judge_handshake(state, version, kind, flags, seq, payload, intact):
    if version != 1:
        return bye(51)
    if kind != (0x01 if state == "await_hello" else 0x03) or seq or flags or not intact:
        return bye(50)
    try:
        fields = message(kind, payload)
    except Refusal:
        return bye(50)
    if kind == 0x01 and not fields["min_version"] <= 1 <= fields["max_version"]:
        return bye(51)
    return TAKEN


def judge_serving(state, found, serving):
    version, kind, flags, seq, payload, intact = found
    if not 1 <= version <= serving["version"]:
        return bye(51)
    if 0x10 <= kind <= 0x1F:
        return judge_sequenced(state, found, serving)
    if seq:
        return bye(44)
    if not intact:
        return nack(22, 0, serving["expected_seq"])
    if flags or kind not in (0x08, 0x40, 0x7F):
        return bye(44)
    try:
        fields = message(kind, payload)
    except Refusal:
        return bye(44)
    if kind == 0x08 and fields["schema"] in serving["hashes"]:
        if hashlib.sha256(payload).digest()[:8] != serving["hashes"][fields["schema"]]:
            return nack(23, 0, serving["expected_seq"])
    return TAKEN


def covered_from(payload, seq):
    """R45: the first number that an intact GAP covers, whatever is wrong behind that field."""
    first = 0
    for i, byte in enumerate(payload[:10]):
        first |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return first if first <= seq else seq
    return seq


def judge_sequenced(state, found, serving):
    _, kind, flags, seq, payload, intact = found
    expected = serving["expected_seq"]
    if not 1 <= seq <= SEQ_MAX:
        return bye(44)
    first = covered_from(payload, seq) if kind == 0x12 and intact else seq
    if first > serving["limit_seq"]:
        return bye(43)
    if seq < expected:
        durable = serving["durable_seq"]
        return {"outcome": "ack", "seq": durable} if seq <= durable else DROPPED
    if first > expected:
        return DROPPED if state == "serving_dropping" else nack(21, seq, expected)
    if not intact:
        return nack(35 if state == "serving_crc_failed_5" else 22, seq, expected)
    try:
        if flags:
            raise Refusal(34, "R11")
        if kind not in (0x11, 0x12, 0x14):
            raise Refusal(32, "R14")
        fields = message(kind, payload)
        if kind == 0x12 and fields["from_seq"] > seq:
            raise Refusal(33, "R45")
        if kind == 0x11:
            check_readings(fields, serving["schemas"])
    except Refusal as refusal:
        return nack(refusal.code, seq, expected)
    return TAKEN


# ---- section 5: the handshake


def hkdf(key, info):
    secret = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(secret, info + b"\x01", "sha256")


def device_key(fleet_key, device, version=0):
    replaced = b"\0" + version.to_bytes(4, "little") if version else b""
    return hkdf(fleet_key, b"fieldgate device v1" + device.encode() + replaced)


def macs(key, binding, hello, challenge, auth, welcome):
    transcript = hello + challenge + auth[:-32]
    device = hmac.digest(
        key, b"fieldgate device v1" + binding + hashlib.sha256(transcript).digest(), "sha256"
    )
    transcript = hello + challenge + auth + welcome[:-32]
    gateway = hmac.digest(
        key, b"fieldgate gateway v1" + binding + hashlib.sha256(transcript).digest(), "sha256"
    )
    return device, gateway


# ---- the files


class Tally:
    def __init__(self):
        self.checked, self.wrong = 0, []

    def check(self, found, expected, what):
        self.checked += 1
        if found != expected:
            self.wrong.append(f"{what}: found {found}, expected {expected}")


def load(file):
    return json.loads((HERE / file).read_text())


def plain(value):
    """Fields as the vectors show them: bytes as hex, numbers beyond 2^53 as texts."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, int) and abs(value) > MONO_MAX else value


def check_checksums(tally):
    tally.check(crc16(b"123456789"), 0xEA82, "CRC-16/DNP")
    tally.check(crc32c(b"123456789"), 0xE3069283, "CRC-32C")


def check_frames(tally, file):
    content = load(file)
    serving = dict(content["states"]["serving"])
    declared = [bytes.fromhex(text) for text in serving["schemas"]]
    schemas = [message(0x08, payload) for payload in declared]
    serving["schemas"] = {schema["schema"]: schema for schema in schemas}
    serving["hashes"] = {
        schema["schema"]: hashlib.sha256(payload).digest()[:8]
        for schema, payload in zip(schemas, declared)
    }
    for vector in content["vectors"]:
        data = bytes.fromhex(vector["hex"])
        tally.check(judge(vector["state"], data, serving), vector["expect"], vector["id"])
        if "fields" in vector:
            _, kind, _, _, payload, _ = frame(data, 4096)
            tally.check(plain(message(kind, payload)), vector["fields"], vector["id"])


def check_primitives(tally):
    for vector in load("primitives.json")["vectors"]:
        kind, data = vector["type"], bytes.fromhex(vector["hex"])
        reader = Reader(data)
        try:
            value = reader.take(4) if kind == "array4" else getattr(reader, kind)()
            reader.end()
            shown = value.hex() if isinstance(value, bytes) else str(value)
        except Refusal:
            shown = None
        tally.check(shown, vector.get("value"), f"{kind} {vector['hex']}")


def check_columns(tally):
    content = load("columns.json")
    for case in content["columns"]:
        column = {
            "encoding": case["encoding"],
            "nulls": bytes.fromhex(case["nulls"]),
            "data": bytes.fromhex(case["data"]),
        }
        try:
            values = decode_column(column, case["kind"], case["exp10"], case["rows"])
            found = [None if v is None else struct.pack(">d", v).hex() for v in values]
        except Refusal as refusal:
            found = refusal.code
        tally.check(found, case.get("values", case.get("error")), case["id"])
    for case in content["times"]:
        data = {**case, "t0": int(case["t0"]), "dt": bytes.fromhex(case["dt"])}
        try:
            found = [str(time) for time in decode_times(data)]
        except Refusal as refusal:
            found = refusal.code
        tally.check(found, case.get("times_us", case.get("error")), case["id"])


def payload_of(text):
    _, _, _, _, payload, intact = frame(bytes.fromhex(text), 512)
    assert intact
    return payload


def check_handshake(tally):
    content = load("handshake.json")
    for case in content["keys"]:
        key = device_key(bytes.fromhex(case["fleet_key"]), case["name"], case["key_version"])
        tally.check(key.hex(), case["device_key"], f"key {case['key_version']} of {case['name']}")
    for case in content["handshakes"]:
        payloads = [payload_of(case[k]) for k in ("hello", "challenge", "auth", "welcome")]
        key = device_key(bytes.fromhex(case["fleet_key"]), case["name"])
        device, gateway = macs(key, bytes.fromhex(case["channel_binding"]), *payloads)
        tally.check(device.hex(), case["device_mac"], f"{case['id']} device")
        tally.check(device, payloads[2][-32:], f"{case['id']} AUTH")
        tally.check(gateway.hex(), case["gateway_mac"], f"{case['id']} gateway")
        tally.check(gateway, payloads[3][-32:], f"{case['id']} WELCOME")
    for case in content["schema_hashes"]:
        digest = hashlib.sha256(bytes.fromhex(case["declare"])).digest()
        tally.check(digest[:8].hex(), case["hash"], "schema hash")


NAMES = {0x01: "HELLO", 0x02: "CHALLENGE", 0x03: "AUTH", 0x40: "PING", 0x41: "PONG"}


def shown(kind, seq, fields):
    if kind == 0x04:
        return f"WELCOME: durable {fields['durable_seq']}, limit {fields['limit_seq']}"
    if kind == 0x08:
        return f"DECLARE {fields['schema']}"
    if kind == 0x12:
        return f"GAP {fields['from_seq']} to {seq}"
    if kind == 0x20:
        return f"ACK {seq}, limit {fields['limit_seq']}"
    if kind == 0x21:
        return f"NACK {fields['code']} of {seq}, expects {fields['expected_seq']}"
    return f"DATA {seq}" if kind == 0x11 else NAMES[kind]


def check_exchanges(tally):
    """The device's side followed by the rules of section 10: what it may delete and send next."""
    fleet_key = bytes.fromhex(load("handshake.json")["keys"][0]["fleet_key"])
    for exchange in load("exchanges.json")["exchanges"]:
        deleted, send_next, limit, handshake, held = 0, 0, 0, {}, set()
        for step in exchange["steps"]:
            if step["from"] == "network":
                continue
            what = f"{exchange['id']}: {step['shows']}"
            _, kind, _, seq, payload, intact = frame(bytes.fromhex(step["hex"]), 4096)
            fields = message(kind, payload)
            tally.check((intact, shown(kind, seq, fields)), (True, step["shows"]), what)
            if kind <= 0x04:
                handshake[kind] = payload
            if kind == 0x01:
                held = set(range(fields["oldest_seq"], fields["next_seq"]))
            elif kind == 0x04:
                key = device_key(fleet_key, message(0x01, handshake[1])["name"])
                device, gateway = macs(key, bytes(32), *(handshake[k] for k in (1, 2, 3, 4)))
                tally.check((device, gateway), (handshake[3][-32:], payload[-32:]), what)
                deleted, limit = fields["durable_seq"], fields["limit_seq"]
                send_next = deleted + 1
            elif kind in (0x11, 0x12):
                first = fields.get("from_seq", seq)
                tally.check((first, first <= limit), (send_next, True), what)
                send_next = seq + 1
            elif kind == 0x20:
                deleted, limit = max(deleted, seq), max(limit, fields["limit_seq"])
                send_next = max(send_next, deleted + 1)
            elif kind == 0x21 and fields["code"] < 30:
                send_next = fields["expected_seq"]
        tally.check(deleted, exchange["device_deleted_through"], exchange["id"])
        left = sorted(seq for seq in held if seq > deleted)
        tally.check(left, exchange["device_holds"], exchange["id"])


# ---- section 9: time


class Clocks:
    """The clocks of a device's boots, as a gateway keeps them in one session."""

    def __init__(self, case):
        self.present = case["present_boot"]
        self.clocks = {known["boot"]: dict(known, valid_from=0) for known in case["known"]}
        self.alive, self.latest = [], None

    def measure(self, new):
        if self.latest and self.latest[0] == new["boot"]:
            self.latest = None
        kept, valid_from = self.clocks.get(new["boot"]), 0
        if kept and kept["delay_us"] is not None:
            device = [c["measured_at_us"] - c["delay_us"] // 2 - c["offset_us"] for c in (kept, new)]
            age = new["measured_at_us"] - kept["measured_at_us"]
            apart = new["offset_us"] - kept["offset_us"]
            most = kept["delay_us"] // 2 + new["delay_us"] // 2 + abs(age) // 2000 + 10_000
            went_back = device[1] < device[0] - 10_000_000
            is_better = new["delay_us"] <= kept["delay_us"] + max(age, 0) // 20_000
            if not (went_back or abs(apart) > most or is_better):
                return
            over = apart % 2**32
            wrapped = apart > 2**31 and min(over, 2**32 - over) <= most
            valid_from = device[1] if went_back or wrapped else kept["valid_from"]
        self.clocks[new["boot"]] = dict(new, valid_from=valid_from)

    def frame(self, frame):
        oldest, newest, received = (frame[key] for key in ("oldest_us", "newest_us", "received_us"))
        if "boot" not in frame:
            offset = 0
            is_good = oldest >= 1_577_836_800_000_000 and newest <= received + 86_400_000_000
            quality = "utc" if is_good else "suspect"
        else:
            offset, quality = self.since_boot(frame["boot"], oldest, newest, received)
        if quality != "suspect":
            self.alive.append(newest + offset)
        return offset, quality

    def since_boot(self, boot, oldest, newest, received):
        if boot not in self.clocks:
            known = [clock["measured_at_us"] for of, clock in self.clocks.items()
                     if clock["delay_us"] is not None and of != self.present]
            fitting = [at for at in known + self.alive if at <= received - newest]
            offset = max(fitting, default=received - newest)
            self.clocks[boot] = {"offset_us": offset, "delay_us": None, "valid_from": 0}
        clock = self.clocks[boot]
        offset, is_measured = clock["offset_us"], clock["delay_us"] is not None
        most = 86_400_000_000
        if is_measured:
            most = 60_000_000 + max(received - clock["measured_at_us"], 0) // 2000
        is_same = self.latest and self.latest[0] == boot
        went_back = is_same and (self.latest[2] or newest < self.latest[1] - 1_800_000_000)
        highest = max(newest, self.latest[1]) if is_same and not went_back else newest
        self.latest = (boot, highest, went_back)
        if newest + offset - received > most or oldest < clock["valid_from"] or went_back:
            return offset, "suspect"
        return offset, "anchored" if is_measured else "unanchored"


def check_times(tally):
    for case in load("times.json")["cases"]:
        clocks = Clocks(case)
        for step in case["steps"]:
            if "measured" in step:
                clocks.measure(step["measured"])
                found = clocks.clocks[step["measured"]["boot"]]["offset_us"]
                tally.check(found, step["offset_us"], case["id"])
            else:
                found = clocks.frame(step["frame"])
                tally.check(found, (step["offset_us"], step["quality"]), case["id"])


def check_worked_example(tally):
    """The frames of SPEC.md's example are those of the vectors, byte for byte."""
    text = (HERE.parent / "SPEC.md").read_text().split("## 16 Worked example")[1]
    blocks = text.split("## 17")[0].split("```")[1::2]
    shown_frames = []
    for block in blocks:
        runs = [re.match(r"(?:[0-9a-f]{2}(?: |$))+", line) for line in block.splitlines()]
        shown_frames.append("".join(run.group().replace(" ", "") for run in runs if run))
    case = load("handshake.json")["handshakes"][0]
    expected = [case[key] for key in ("hello", "challenge", "auth", "welcome")]
    steps = load("exchanges.json")["exchanges"][1]["steps"]
    wanted = ("DATA 2", "ACK 2, limit 66")
    expected += [next(s["hex"] for s in steps if s["shows"] == what) for what in wanted]
    tally.check(shown_frames, expected, "worked example")


def main():
    tally = Tally()
    check_worked_example(tally)
    check_checksums(tally)
    check_primitives(tally)
    check_columns(tally)
    check_handshake(tally)
    for file in ("frames.json", "messages.json", "readings.json"):
        check_frames(tally, file)
    check_exchanges(tally)
    check_times(tally)
    for line in tally.wrong:
        print(line)
    print(f"{tally.checked} checks, {len(tally.wrong)} wrong")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
