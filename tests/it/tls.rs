//! The TLS listener: accepted and rejected connections, and certificates that change at run time.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fieldgate_protocol::auth::NO_CHANNEL_BINDING;
use fieldgate_protocol::error::Code;
use rustls::client::WantsClientCert;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{
    ClientConfig, ClientConnection, ConfigBuilder, RootCertStore, SupportedProtocolVersion, version,
};
use tempfile::TempDir;

use crate::malformed::assert_serves;
use crate::support::client::{Heard, Link, Login, Welcomed};
use crate::support::fleet::simulator;
use crate::support::gateway::{Ended, Gateway, command, run};
use crate::support::logs::{by_default, keep_key, keep_of};
use crate::support::messages::{SCHEMA, declare, readings};
use crate::support::wire::connect;

/// A data directory with a certificate, kept until dropped.
pub struct Site(pub TempDir);

impl Site {
    pub fn new() -> Site {
        let site = Site(TempDir::new().expect("a directory"));
        site.tls(&["init"]);
        site
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    /// Runs `fieldgate tls …` in this directory.
    pub fn tls(&self, args: &[&str]) {
        let dir = self.0.path().to_str().expect("UTF-8");
        let args = [&["tls", "--data-dir", dir], args].concat();
        let ended = run(&args);
        assert!(ended.status.success(), "{ended:?}");
        for name in ["ca.key", "server.key"] {
            keep_key(private_key(&self.path("tls").join(name)).secret_der());
        }
    }

    pub fn start(&self, flags: &[&str]) -> Gateway {
        let flags = [&["--tls-listen", "127.0.0.1:0"], flags].concat();
        Gateway::start_in(self.0.path(), &flags)
    }

    /// Returns a client that trusts this site's CA.
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::new(trusting(&self.path("tls/ca.pem"), &version::TLS13).with_no_client_auth())
    }

    /// Returns a client that presents a certificate made for `name`.
    fn identified(&self, name: &str) -> Arc<ClientConfig> {
        self.identified_to(name, &self.path("tls/ca.pem"))
    }

    /// The same, for a gateway whose certificate is signed by `ca`.
    fn identified_to(&self, name: &str, ca: &Path) -> Arc<ClientConfig> {
        let dir = self.path("devices");
        self.tls(&["device", name, "--out-dir", dir.to_str().expect("UTF-8")]);
        let [cert, key] = ["pem", "key"].map(|end| dir.join(format!("{name}.{end}")));
        let cert = CertificateDer::from_pem_file(cert).expect("a certificate");
        let key = private_key(&key);
        keep_key(key.secret_der());
        let client = trusting(ca, &version::TLS13);
        Arc::new(
            client
                .with_client_auth_cert(vec![cert], key)
                .expect("a pair"),
        )
    }
}

pub fn private_key(path: &Path) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(path).expect("a key")
}

fn trusting(
    ca: &Path,
    version: &'static SupportedProtocolVersion,
) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(ca).expect("a certificate");
    roots.add(ca).expect("an authority");
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])
        .expect("a version")
        .with_root_certificates(roots)
}

fn login_tls(gateway: &Gateway, client: &Arc<ClientConfig>, name: &str) -> (Link, Welcomed) {
    let (mut link, binding) = Link::open_tls(gateway.tls_addr(), client).expect("TLS");
    let login = Login {
        binding,
        ..gateway.device(name)
    };
    let transcript = link.challenge(&login);
    let welcomed = link.authenticate(&login, transcript);
    (link, welcomed)
}

#[test]
fn readings_go_through_both_versions() {
    let site = Site::new();
    let gateway = site.start(&["--window-frames", "2000"]);
    for (name, version) in [("new", &version::TLS13), ("old", &version::TLS12)] {
        let client = trusting(&site.path("tls/ca.pem"), version).with_no_client_auth();
        let (mut link, _) = login_tls(&gateway, &Arc::new(client), name);
        link.send(&declare(SCHEMA));
        // Many at a time, so that reads do not end at record boundaries.
        let frames: Vec<u8> = (1..=2_000).flat_map(readings).collect();
        for chunk in frames.chunks(9_973) {
            link.send(chunk);
        }
        link.expect_ack(2_000);
        link.finish();
        link.expect_closed();
        assert_eq!(gateway.database().durable_seq(name), 2_000);
    }
}

/// R34, R35: a signature for one connection proves nothing on another.
#[test]
fn c14_a_proof_is_valid_for_its_connection_only() {
    let site = Site::new();
    let gateway = site.start(&[]);
    let client = site.client();
    let (mut link, binding) = Link::open_tls(gateway.tls_addr(), &client).expect("TLS");
    let (_, other) = Link::open_tls(gateway.tls_addr(), &client).expect("TLS");
    assert_ne!(binding, other);
    for wrong in [NO_CHANNEL_BINDING, other] {
        let login = Login {
            binding: wrong,
            ..gateway.device("pump")
        };
        let transcript = link.challenge(&login);
        let (auth, _) = login.auth(transcript);
        link.send(&auth);
        link.expect_bye(Code::Authentication);
        link = Link::open_tls(gateway.tls_addr(), &client).expect("TLS").0;
    }
    // The other direction: plain TCP has no channel binding.
    let login = Login {
        binding,
        ..gateway.device("pump")
    };
    let mut link = Link::open(gateway.addr);
    let transcript = link.challenge(&login);
    link.send(&login.auth(transcript).0);
    link.expect_bye(Code::Authentication);
    assert_serves(&gateway, "good");
}

/// Each peer that sends something and ends before it has proved a key causes a log line with the reason, and is listed
/// by `device refused`; a silent one is not.
#[test]
fn rejected_peers_are_logged_with_the_reason() {
    const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let site = Site::new();
    let mut gateway = site.start(&[]);
    let hello = gateway.device("pump").hello();
    for (what, addr, bytes) in [
        ("FWP on the TLS port", gateway.tls_addr(), &hello[..]),
        ("HTTP on the TLS port", gateway.tls_addr(), HTTP),
        ("HTTP on the plain port", gateway.addr, HTTP),
    ] {
        let mut socket = connect(addr);
        socket.write_all(bytes).expect("sends");
        let answer = until_closed(&mut socket);
        // At most a TLS alert, which is 7 bytes long.
        assert!(answer.len() <= 7, "{what}: {answer:?}");
    }
    let refused = Link::open_tls(gateway.addr, &site.client()).expect_err("no TLS there");
    eprintln!("TLS on the plain port: {refused}");
    // Signed by another CA.
    let other_site = Site::new();
    Link::open_tls(gateway.tls_addr(), &other_site.client()).expect_err("its CA is not trusted");
    let mut old = connect(gateway.tls_addr());
    old.write_all(&client_hello([3, 2])).expect("sends");
    until_closed(&mut old);
    let mut proxy = connect(gateway.addr);
    proxy
        .write_all(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n")
        .expect("sends");
    until_closed(&mut proxy);
    // One peer starts a handshake and disconnects; one sends an invalid device name.
    connect(gateway.addr)
        .write_all(&hello[..20])
        .expect("sends");
    let mut strange = connect(gateway.addr);
    let invalid = gateway.device("p mp").hello();
    strange.write_all(&invalid).expect("sends");
    until_closed(&mut strange);
    // Health checks connect and send nothing.
    for addr in [gateway.addr, gateway.tls_addr()] {
        drop(connect(addr));
    }
    assert_serves(&gateway, "good");
    let data_dir = gateway.data_dir().to_str().expect("UTF-8").to_owned();
    gateway.terminate();
    let Ended { stderr, .. } = gateway.wait();
    let log = by_default(&stderr);
    let refused: Vec<&str> = { log.lines() }
        .filter(|line| line.contains("connection refused"))
        .collect();
    let args = [
        "device",
        "refused",
        "--data-dir",
        &data_dir,
        "--format",
        "csv",
    ];
    let listed = keep_of(command(&args).output().expect("runs")).stdout;
    let listed = String::from_utf8(listed).expect("UTF-8");
    let reasons = [
        ("plain text on the TLS port", 2),
        ("HTTP or a PROXY header", 2),
        ("TLS on the plain TCP port", 1),
        ("rejected the gateway's certificate (DecryptError)", 1),
        ("no version or cipher in common", 1),
        ("peer closed the connection", 1),
        ("claimed=\"p mp\"", 1),
    ];
    for (reason, lines) in reasons {
        let found = refused.iter().filter(|line| line.contains(reason)).count();
        assert_eq!(found, lines, "{reason}: {log}");
    }
    assert_eq!(
        refused.len(),
        reasons.iter().map(|(_, lines)| lines).sum::<usize>(),
        "{log}"
    );
    // One row for all peers without a name at one address, with the latest reason; and one for the peer with a name.
    let rows: Vec<&str> = listed.lines().skip(1).collect();
    assert_eq!(rows.len(), 2, "{listed}");
    assert!(
        rows.iter().any(|row| row.contains(",8,127.0.0.1,\"\",")),
        "{listed}"
    );
    let named = ",1,127.0.0.1,p mp,50 authentication,";
    assert!(rows.iter().any(|row| row.contains(named)), "{listed}");
}

fn until_closed(socket: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    // A reset is an end, too.
    let _ = socket.read_to_end(&mut answer);
    answer
}

/// RFC 8996.
#[test]
fn c06_tls_before_1_2_is_refused() {
    let site = Site::new();
    let gateway = site.start(&[]);
    let answer = |version: [u8; 2]| {
        let mut socket = connect(gateway.tls_addr());
        socket.write_all(&client_hello(version)).expect("sends");
        let mut answer = [0; 7];
        socket.read_exact(&mut answer).expect("an answer");
        answer
    };
    // TLS 1.2 continues the handshake; 1.1 gets fatal alert 70, protocol_version.
    assert_eq!(answer([3, 3])[0], 0x16);
    let refused = answer([3, 2]);
    assert_eq!((refused[0], &refused[5..]), (0x15, &[2, 70][..]));
}

/// Returns a ClientHello as it was before TLS 1.3.
fn client_hello(version: [u8; 2]) -> Vec<u8> {
    let with_length = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let extension = |number: u8, content: &[u8]| [&[0, number][..], &with_length(content)].concat();
    let extensions = [
        // x25519 and P-256; ECDSA with SHA-256; extended master secret.
        extension(10, &with_length(&[0, 0x1D, 0, 0x17])),
        extension(13, &with_length(&[4, 3])),
        extension(23, &[]),
    ];
    // Random, no session, ECDHE-ECDSA-AES128-GCM and -CBC, no compression.
    let mut hello = version.to_vec();
    hello.extend([7; 32]);
    hello.push(0);
    hello.extend(with_length(&[0xC0, 0x2B, 0xC0, 0x09]));
    hello.extend([1, 0]);
    hello.extend(with_length(&extensions.concat()));
    let handshake = [&[1, 0][..], &with_length(&hello)].concat();
    [&[0x16, 3, 1][..], &with_length(&handshake)].concat()
}

/// Performs a handshake up to the client's last message, which is not sent yet; also returns the lengths of the
/// gateway's records.
fn shake_hands(site: &Site, gateway: &Gateway) -> (TcpStream, ClientConnection, Vec<usize>) {
    let host = "localhost".try_into().expect("a name");
    let mut conn = ClientConnection::new(site.client(), host).expect("a config");
    let mut socket = connect(gateway.tls_addr());
    conn.write_tls(&mut socket).expect("sends");
    let mut lengths = Vec::new();
    while conn.is_handshaking() {
        let mut record = vec![0; 5];
        socket.read_exact(&mut record).expect("a record");
        let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
        lengths.push(length);
        record.resize(5 + length, 0);
        socket.read_exact(&mut record[5..]).expect("a whole record");
        conn.read_tls(&mut &record[..]).expect("takes it");
        conn.process_new_packets().expect("TLS");
    }
    (socket, conn, lengths)
}

/// A fault directly after the handshake ends the connection normally.
#[test]
fn garbage_after_a_handshake_closes_the_connection() {
    let site = Site::new();
    let mut gateway = site.start(&[]);
    let (mut socket, mut conn, _) = shake_hands(&site, &gateway);
    let mut last_words = Vec::new();
    conn.write_tls(&mut last_words).expect("writes");
    // A well-formed record that no key has sealed.
    last_words.extend([&[0x17, 3, 3, 0, 40][..], &[7; 40]].concat());
    socket.write_all(&last_words).expect("sends");
    until_closed(&mut socket);
    assert_serves(&gateway, "good");
    gateway.terminate();
    let Ended { stderr, .. } = gateway.wait();
    let log = by_default(&stderr);
    let of_peers = log.lines().filter(|line| line.contains("peer="));
    assert_eq!(of_peers.count(), 1, "{log}");
    assert!(log.contains("TLS failed: "), "{log}");
}

/// Bytes of unauthenticated peers are counted with their TLS overhead.
#[test]
fn c09_tls_records_before_authentication_are_limited() {
    let site = Site::new();
    let gateway = site.start(&[]);
    // Long enough to exceed the limit well before its last byte, wherever a read of the gateway ends.
    let hello = gateway.device(&"p".repeat(32)).hello();
    for (refreshes, is_answered) in [(1, true), (30, false)] {
        let (mut socket, mut conn, _) = shake_hands(&site, &gateway);
        // A closed gateway accepts no more bytes.
        let mut send = |conn: &mut ClientConnection| conn.write_tls(&mut socket).is_ok();
        let is_sent = hello.iter().all(|byte| {
            (0..refreshes).for_each(|_| conn.refresh_traffic_keys().expect("TLS 1.3"));
            conn.writer().write_all(&[*byte]).expect("writes");
            while conn.wants_write() {
                if !send(&mut conn) {
                    return false;
                }
            }
            true
        });
        let mut answer = Vec::new();
        while is_sent
            && answer.is_empty()
            && conn.read_tls(&mut socket).is_ok_and(|count| count > 0)
        {
            let state = conn.process_new_packets().expect("TLS");
            answer.resize(state.plaintext_bytes_to_read(), 0);
            conn.reader().read_exact(&mut answer).expect("is there");
        }
        assert_eq!(!answer.is_empty(), is_answered, "{refreshes}");
    }
}

#[test]
fn records_are_small() {
    let site = Site::new();
    let gateway = site.start(&["--tls-record-bytes-max", "256"]);
    let (_socket, _conn, lengths) = shake_hands(&site, &gateway);
    let (records, longest) = (lengths.len(), lengths.iter().max().expect("some"));
    // The certificate alone is longer; a record also has a tag of 16 bytes and a type.
    assert!(
        records > 4 && *longest <= 256 + 17,
        "{records} records, up to {longest} bytes"
    );
}

#[test]
fn c02_with_mutual_tls_the_certificate_must_be_the_devices() {
    let site = Site::new();
    let ca = site.path("tls/ca.pem");
    let gateway = site.start(&["--tls-client-ca", ca.to_str().expect("UTF-8")]);
    let (mut link, _) = login_tls(&gateway, &site.identified("pump:7_a"), "pump:7_a");
    link.send(&declare(SCHEMA));
    link.send(&readings(1));
    link.expect_ack(1);

    // With another device's certificate, the device's own key does not help.
    let other = site.identified("other");
    let (mut link, binding) = Link::open_tls(gateway.tls_addr(), &other).expect("TLS");
    let login = Login {
        binding,
        ..gateway.device("pump:7_a")
    };
    let transcript = link.challenge(&login);
    link.send(&login.auth(transcript).0);
    link.expect_bye(Code::Authentication);

    // Without one, or with one of another CA, no session starts. In TLS 1.3 a client
    // learns of that with the first answer.
    let foreign = Site::new().identified_to("pump:7_a", &ca);
    for client in [site.client(), foreign] {
        if let Ok((mut link, _)) = Link::open_tls(gateway.tls_addr(), &client) {
            link.send_in_vain(&gateway.device("pump:7_a").hello());
            assert!(matches!(link.try_hear(), Err(_) | Ok(Heard::Closed)));
        }
    }
    assert_eq!(gateway.database().durable_seq("pump:7_a"), 1);
}

#[test]
fn a_rejected_fleet_prints_the_reason() {
    let site = Site::new();
    let ca = site.path("tls/ca.pem");
    let ca = ca.to_str().expect("UTF-8");
    let gateway = site.start(&["--tls-client-ca", ca]);
    let key = site.path("fleet.key");
    let key = key.to_str().expect("UTF-8");
    // Plain TCP to the TLS port, and TLS without a certificate.
    for (flags, reason) in [
        (&[][..], ": not an FWP frame; is this a TLS port?"),
        (
            &["--tls", "--ca", ca],
            ": received fatal alert: CertificateRequired",
        ),
    ] {
        let mut command = simulator("run");
        command.args(["--gateway", &gateway.tls_addr().to_string()]);
        command.args(["--key-file", key, "--devices", "2", "--duration", "1s"]);
        let output = keep_of(command.args(flags).output().expect("starts"));
        let said = String::from_utf8_lossy(&output.stdout);
        let mut lost = said
            .lines()
            .filter(|line| line.starts_with("connections lost: "));
        assert!(lost.any(|line| line.ends_with(reason)), "{flags:?}: {said}");
        assert_eq!(output.status.code(), Some(1));
    }
}

#[test]
fn c07_certificates_are_reloaded_and_sessions_continue() {
    let site = Site::new();
    let mut gateway = site.start(&[]);
    let client = site.client();
    let (mut session, _) = login_tls(&gateway, &client, "pump");
    session.send(&declare(SCHEMA));
    session.send(&readings(1));
    session.expect_ack(1);
    let shown = |gateway: &Gateway| {
        let (link, _) = Link::open_tls(gateway.tls_addr(), &client).expect("TLS");
        link.certificate()
    };
    let first = shown(&gateway);
    assert_eq!(first, session.certificate());

    // The gateway reloads because the files have changed.
    site.tls(&["init"]);
    let second = until(|| Some(shown(&gateway)).filter(|certificate| *certificate != first));

    // An unusable file is logged, and changes nothing.
    let cert = site.path("tls/server.pem");
    let good = std::fs::read_to_string(&cert).expect("a certificate");
    std::fs::write(&cert, "nothing of the kind").expect("writes");
    gateway.signal("HUP");
    gateway.wait_for_line("could not reload settings, keeping the old ones");
    assert_eq!(shown(&gateway), second);

    // The gateway reloads at the latest when it receives the signal.
    std::fs::write(&cert, good).expect("writes");
    site.tls(&["init", "--days", "30"]);
    gateway.signal("HUP");
    until(|| Some(shown(&gateway)).filter(|certificate| *certificate != second));

    session.send(&readings(2));
    session.expect_ack(2);
    gateway.terminate();
    session.expect_bye(Code::Shutdown);
    gateway.wait();
}

/// Polls until there is a result, for a limited time.
pub fn until<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let started = std::time::Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "never came");
    }
}

#[test]
fn unusable_tls_files_are_rejected_with_one_line() {
    use std::os::unix::fs::PermissionsExt;
    let refused = |site: &Site, flags: &[&str]| {
        let dir = site.0.path().to_str().expect("UTF-8");
        let listen = ["--listen", "127.0.0.1:0", "--tls-listen", "127.0.0.1:0"];
        let ended = run(&[&["serve", "--data-dir", dir][..], &listen, flags].concat());
        let said = by_default(&ended.stderr);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!ended.status.success());
        said
    };
    let none = Site(TempDir::new().expect("a directory"));
    let said = refused(&none, &[]);
    assert!(said.contains("fieldgate tls init"), "{said}");

    let site = Site::new();
    let key = site.path("tls/server.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("chmod");
    let said = refused(&site, &[]);
    assert!(said.contains("others can read it; run chmod 600"), "{said}");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");

    let other = Site::new();
    let path = |site: &Site, file| site.path(file).to_str().expect("UTF-8").to_owned();
    let said = refused(
        &site,
        &[
            "--tls-cert",
            &path(&site, "tls/server.pem"),
            "--tls-key",
            &path(&other, "tls/server.key"),
        ],
    );
    assert!(said.contains("cannot use certificate"), "{said}");
    let said = refused(&site, &["--tls-client-ca", &path(&site, "tls/server.key")]);
    assert!(said.contains("file contains none"), "{said}");
    // Files of other programs are not overwritten.
    std::fs::remove_file(site.path("tls/ca.key")).expect("removes");
    let dir = site.0.path().to_str().expect("UTF-8");
    let ended = run(&["tls", "init", "--data-dir", dir]);
    assert!(
        ended.stderr.contains("was not created by this command"),
        "{}",
        ended.stderr
    );
}
