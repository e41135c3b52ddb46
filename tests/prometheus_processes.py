"""Processes for `tests/prometheus`: gateways, Postgres, simulated devices and Prometheus."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

TESTS = pathlib.Path(__file__).resolve().parent
# Time for an alert to fire or to resolve.
PATIENCE_S = 90
# Minutes and hours become seconds: the sampling interval of this test is one second.
SHORTER = [
    # Longer than PATIENCE_S, so that time alone does not let the alert resolve.
    (r"\[1h:1m\]", "[2m:1s]"),
    (r"\[\d+[mh]\]", "[10s]"),
    # On a loaded machine, some scrapes in a row may fail.
    (r"for: 2m", "for: 12s"),
    (r"for: \d+m", "for: 3s"),
    # After a failed scrape, an alert would resolve and fire again.
    (r"^( +)- alert: \w+$", r"\g<0>\n\1  keep_firing_for: 8s"),
    # In proportion to 10 s instead of 6 h.
    (r"3 \* 86400", "120"),
    # The gateway measures its spool every 5 s.
    (r"> 60+$", "> 10"),
]
# All processes that were started here.
RUNNING = []


def eventually(what, happened, within_s=PATIENCE_S):
    """Waits until `happened()` is true, and returns its result."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := happened():
            return found
        time.sleep(0.1)
    sys.exit(f"FAILED: not within {within_s} s: {what}")


def say(line):
    # One call, so that lines of several threads do not mix.
    print(f"{line}\n", end="", flush=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command, log=os.devnull):
    """Starts a program, which `end_all` ends."""
    with open(log, "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    RUNNING.append(process)
    return process


def end_all(work):
    """Ends everything that was started here, and Postgres below `work`."""
    for process in RUNNING:
        process.kill()
        process.wait()
    subprocess.run([TESTS / "postgres", "stop", work])


class Gateway:
    """A gateway, always at the same addresses. Alerts name it `name`."""

    def __init__(self, program, work, name, *flags):
        self.program, self.name, self.flags = program, name, flags
        self.data = f"{work}/{name}"
        self.log = f"{self.data}.log"
        self.address, self.http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.start()

    def start(self):
        listen = ["--listen", self.address, "--http", self.http]
        serve = [self.program, "serve", "--data-dir", self.data, *listen, *self.flags]
        self.process = run([*self.before(), *serve], self.log)
        eventually(f"the gateway {self.name} is ready", lambda: self.is_ready() or self.process.poll())
        if self.process.returncode:
            sys.exit(f"FAILED: the gateway {self.name} does not start: {open(self.log).read()}")

    def before(self):
        """Returns the program and arguments that start the gateway."""
        return []

    def is_ready(self):
        try:
            return urllib.request.urlopen(f"http://{self.http}/readyz", timeout=5).status == 200
        except OSError:
            return False

    def files(self):
        """Returns the data directory, as seen by this process."""
        return self.data

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)

    def command(self, *arguments):
        command = [self.program, *arguments, "--data-dir", self.data]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class GatewayOnSmallDisk(Gateway):
    """A gateway whose data is on a disk that only its process has mounted."""

    UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    MOUNT = 'mount -t tmpfs -o size=128m,mode=700 disk "$0" && exec "$@"'

    @classmethod
    def is_possible(cls, work):
        return shutil.which("unshare") and run([*cls.UNSHARE, cls.MOUNT, work, "true"]).wait() == 0

    def before(self):
        os.makedirs(self.data)
        return [*self.UNSHARE, self.MOUNT, self.data]

    def files(self):
        return f"/proc/{self.process.pid}/root{self.data}"

    def free_bytes(self):
        disk = os.statvfs(self.files())
        return disk.f_bavail * disk.f_frsize


class Postgres:
    """A cluster that can be frozen, stopped and started again."""

    def __init__(self, directory):
        self.directory = directory
        directory.mkdir()
        # Postgres may run as another user.
        directory.chmod(0o711)
        start = [TESTS / "postgres", "start", directory]
        self.url = subprocess.run(start, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    @staticmethod
    def find():
        """Returns the directory of the server programs and the user who runs them; `None` if there are none."""
        found = subprocess.run([TESTS / "postgres", "find"], stdout=subprocess.PIPE, text=True)
        return [*found.stdout.split(), None][:2] if found.returncode == 0 else None

    def freeze(self):
        """Halts all its processes: clients see a server that does not respond. `stop` also works afterwards."""
        postmaster = (self.directory / "postgres/data/postmaster.pid").read_text().split()[0]
        # The postmaster first: then it cannot create new ones.
        os.kill(int(postmaster), signal.SIGSTOP)
        processes = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, stdout=subprocess.PIPE, text=True)
        for pid, parent in (line.split() for line in processes.stdout.splitlines()):
            if parent == postmaster:
                os.kill(int(pid), signal.SIGSTOP)

    def stop(self):
        subprocess.run([TESTS / "postgres", "stop", self.directory], check=True)

    def start_again(self):
        programs, user = self.find()
        files = self.directory / "postgres"
        # Unlike `start`, `restart` uses the options of the last start.
        restart = [f"{programs}/pg_ctl", "-D", files / "data", "-l", files / "log", "-w", "-s", "restart"]
        said = subprocess.run(restart, user=user, cwd=files, capture_output=True, text=True)
        if said.returncode != 0:
            sys.exit(f"FAILED: Postgres does not start again: {said.stderr}")


class Fleet:
    """Simulated devices that send until they are stopped."""

    def __init__(self, program, gateway, *flags):
        target = ["--gateway", gateway.address, "--key-file", f"{gateway.files()}/fleet.key"]
        self.process = run([program, "run", *target, "--duration", "10m", *flags], f"{gateway.log}.devices")

    def stop(self):
        self.process.kill()
        self.process.wait()


class Prometheus:
    def __init__(self, work, gateways):
        rules = (TESTS.parent / "ops/prometheus/alerts.yml").read_text()
        for long, short in SHORTER:
            rules, times = re.subn(long, short, rules, flags=re.MULTILINE)
            if not times:
                sys.exit(f"FAILED: no rule has {long}")
        (work / "alerts.yml").write_text(rules)
        targets = [{"targets": [gateway.http], "labels": {"instance": gateway.name}} for gateway in gateways]
        jobs = [{"job_name": "fieldgate", "static_configs": targets}]
        interval = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
        config = {"global": interval, "rule_files": ["alerts.yml"], "scrape_configs": jobs}
        # JSON is YAML.
        (work / "prometheus.yml").write_text(json.dumps(config))
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self.began = time.time()
        command = ["prometheus", f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/tsdb"]
        run([*command, f"--web.listen-address={address}"], work / "prometheus.log")
        eventually("Prometheus answers", lambda: isinstance(self.get("/-/ready", is_json=False), bytes))
        # (gateway, alert) for each time that an alert has to fire.
        self.expected = []

    def get(self, path, is_json=True, **query):
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer) if is_json else answer.read()
        except urllib.error.HTTPError as error:
            return {"status": "error", "error": error.read().decode()}
        except OSError:
            return None

    def query(self, expression, path="/api/v1/query", **more):
        answer = eventually("Prometheus answers", lambda: self.get(path, query=expression, **more))
        if answer["status"] != "success":
            sys.exit(f"FAILED: {expression}: {answer['error']}")
        return answer["data"]["result"]

    def firing(self, gateway):
        """Returns the names of the alerts that fire for a gateway."""
        names = set()
        answer = eventually("Prometheus answers", lambda: self.get("/api/v1/alerts"))
        for alert in answer["data"]["alerts"]:
            labels, summary = alert["labels"], alert["annotations"]["summary"]
            if alert["state"] == "firing" and labels["instance"] == gateway.name:
                if gateway.name not in summary or "<" in summary:
                    sys.exit(f"FAILED: {labels} has the summary {summary}")
                names.add(labels["alertname"])
        return names

    @contextlib.contextmanager
    def incident(self, gateway, *names):
        """Expects that these alerts fire in the block, which gets a function that waits for some or all of them, and
        that they resolve after it."""
        self.expected += [(gateway.name, name) for name in names]

        def fire(*some):
            for name in some or names:
                eventually(f"{name} fires for {gateway.name}", lambda: name in self.firing(gateway))
                say(f"{gateway.name}: {name} fires")

        yield fire
        for name in names:
            eventually(f"{name} resolves for {gateway.name}", lambda: name not in self.firing(gateway))
            say(f"{gateway.name}: {name} resolves")

    def fired(self):
        """Returns (gateway, alert) for each time that an alert has fired."""
        fired = []
        span = {"start": self.began, "end": time.time(), "step": 1}
        for series in self.query('ALERTS{alertstate="firing"}', "/api/v1/query_range", **span):
            times = [0] + [at for at, _ in series["values"]]
            labels = series["metric"]
            fired += [(labels["instance"], labels["alertname"])] * sum(b - a > 1.5 for a, b in zip(times, times[1:]))
        return fired

    def names(self):
        """Returns the names of all alerts."""
        groups = self.get("/api/v1/rules")["data"]["groups"]
        return {rule["name"] for group in groups for rule in group["rules"]}
