//! The TLS listener: what goes through it, who is kept out, and certificates that change under way.

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

use crate::client::{Heard, Link, Login, SCHEMA, Welcomed, declare, readings};
use crate::fleet::simulator;
use crate::gateway::{Ended, Gateway, command, run};
use crate::logs::{by_default, keep_key, keep_of};
use crate::malformed::assert_serves;
use crate::wire::connect;

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

    /// `fieldgate tls …` in this directory.
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

    /// A client that knows this site's authority.
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::new(trusting(&self.path("tls/ca.pem"), &version::TLS13).with_no_client_auth())
    }

    /// A client that shows a certificate made for `name`.
    fn identified(&self, name: &str) -> Arc<ClientConfig> {
        self.identified_to(name, &self.path("tls/ca.pem"))
    }

    /// The same, towards a gateway whose certificate leads to `ca`.
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
        // Many at once, so that a read does not end where a record does.
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

/// R34, R35: what was signed for one connection proves nothing on another.
#[test]
fn c14_a_proof_holds_for_its_connection_alone() {
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
    // And the other way round: on plain TCP there is nothing to bind to.
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

/// Each peer that says something and ends before it has proved a key leaves a line with the reason, and is listed
/// by `device refused`; one that says nothing does not.
#[test]
fn who_does_not_get_through_leaves_a_line_with_the_reason() {
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
        // At most an alert of TLS, which is 7 bytes long.
        assert!(answer.len() <= 7, "{what}: {answer:?}");
    }
    let refused = Link::open_tls(gateway.addr, &site.client()).expect_err("no TLS there");
    eprintln!("TLS on the plain port: {refused}");
    // Of another authority than the gateway's.
    let stranger = Site::new();
    Link::open_tls(gateway.tls_addr(), &stranger.client()).expect_err("it is not trusted");
    let mut old = connect(gateway.tls_addr());
    old.write_all(&client_hello([3, 2])).expect("sends");
    until_closed(&mut old);
    let mut proxy = connect(gateway.addr);
    proxy
        .write_all(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n")
        .expect("sends");
    until_closed(&mut proxy);
    // Begins to say who it is, and leaves; says a name that no device can have.
    connect(gateway.addr)
        .write_all(&hello[..20])
        .expect("sends");
    let mut strange = connect(gateway.addr);
    let nobody = gateway.device("p mp").hello();
    strange.write_all(&nobody).expect("sends");
    until_closed(&mut strange);
    // Health checks.
    for addr in [gateway.addr, gateway.tls_addr()] {
        drop(connect(addr));
    }
    assert_serves(&gateway, "good");
    let data_dir = gateway.data_dir().to_str().expect("UTF-8").to_owned();
    gateway.terminate();
    let Ended { stderr, .. } = gateway.wait();
    let told = by_default(&stderr);
    let refused: Vec<&str> = { told.lines() }
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
        ("plain text at the TLS port", 2),
        ("HTTP or a PROXY header", 2),
        ("TLS at the port for plain text", 1),
        ("refuses the gateway's certificate (DecryptError)", 1),
        ("no version or cipher in common", 1),
        ("peer closed the connection", 1),
        ("claimed=\"p mp\"", 1),
    ];
    for (reason, lines) in reasons {
        let found = refused.iter().filter(|line| line.contains(reason)).count();
        assert_eq!(found, lines, "{reason}: {told}");
    }
    assert_eq!(
        refused.len(),
        reasons.iter().map(|(_, lines)| lines).sum::<usize>(),
        "{told}"
    );
    // All without a name from one address: one row, by the latest of them; and the one with a name.
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
    // A handshake goes on with TLS 1.2; with 1.1 there is a fatal alert, 70: protocol_version.
    assert_eq!(answer([3, 3])[0], 0x16);
    let refused = answer([3, 2]);
    assert_eq!((refused[0], &refused[5..]), (0x15, &[2, 70][..]));
}

/// A ClientHello as it was before TLS 1.3.
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

/// A handshake up to the client's last words, which are not sent yet; with the lengths of the records that the
/// gateway sent.
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

/// What is wrong right behind a handshake is an end like any other.
#[test]
fn a_handshake_with_rubbish_behind_it_is_closed() {
    let site = Site::new();
    let mut gateway = site.start(&[]);
    let (mut socket, mut conn, _) = shake_hands(&site, &gateway);
    let mut last_words = Vec::new();
    conn.write_tls(&mut last_words).expect("writes");
    // A record of the right form that no key has sealed.
    last_words.extend([&[0x17, 3, 3, 0, 40][..], &[7; 40]].concat());
    socket.write_all(&last_words).expect("sends");
    until_closed(&mut socket);
    assert_serves(&gateway, "good");
    gateway.terminate();
    let Ended { stderr, .. } = gateway.wait();
    let told = by_default(&stderr);
    let of_peers = told.lines().filter(|line| line.contains("peer="));
    assert_eq!(of_peers.count(), 1, "{told}");
    assert!(told.contains("TLS failed: "), "{told}");
}

/// What strangers send is counted with all that carries it.
#[test]
fn c09_a_stranger_may_not_send_records_for_ever() {
    let site = Site::new();
    let gateway = site.start(&[]);
    // Long enough to go beyond the bound well before its last byte, wherever a read of the gateway ends.
    let hello = gateway.device(&"p".repeat(32)).hello();
    for (refreshes, is_answered) in [(1, true), (30, false)] {
        let (mut socket, mut conn, _) = shake_hands(&site, &gateway);
        // A gateway that has closed takes no more.
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
    // The certificate alone is longer; a record has a tag of 16 bytes and a type besides.
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

    // Another device's certificate, and that device's right key does not help.
    let other = site.identified("other");
    let (mut link, binding) = Link::open_tls(gateway.tls_addr(), &other).expect("TLS");
    let login = Login {
        binding,
        ..gateway.device("pump:7_a")
    };
    let transcript = link.challenge(&login);
    link.send(&login.auth(transcript).0);
    link.expect_bye(Code::Authentication);

    // Without one, or with one that somebody else signed, there is no session at all. In TLS 1.3 a client
    // hears of that with the first answer.
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
fn a_fleet_that_is_not_let_in_is_told_why() {
    let site = Site::new();
    let ca = site.path("tls/ca.pem");
    let ca = ca.to_str().expect("UTF-8");
    let gateway = site.start(&["--tls-client-ca", ca]);
    let key = site.path("fleet.key");
    let key = key.to_str().expect("UTF-8");
    // Plain to the TLS port, and TLS without a certificate.
    for (flags, reason) in [
        (&[][..], ": not a frame; TLS, perhaps?"),
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
fn c07_certificates_change_under_way_and_sessions_stay() {
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

    // Because the files changed.
    site.tls(&["init"]);
    let second = until(|| Some(shown(&gateway)).filter(|certificate| *certificate != first));

    // A file that cannot be used is told, and changes nothing.
    let cert = site.path("tls/server.pem");
    let good = std::fs::read_to_string(&cert).expect("a certificate");
    std::fs::write(&cert, "nothing of the kind").expect("writes");
    gateway.signal("HUP");
    gateway.wait_for_line("the certificate that was loaded before stays in use");
    assert_eq!(shown(&gateway), second);

    // Because of the signal, at the latest.
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

/// Asks again and again, but not for ever.
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
fn what_cannot_serve_is_refused_with_one_line() {
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
    assert!(said.contains("do not serve"), "{said}");
    let said = refused(&site, &["--tls-client-ca", &path(&site, "tls/server.key")]);
    assert!(said.contains("there is none in it"), "{said}");
    // Another's files are not overwritten.
    std::fs::remove_file(site.path("tls/ca.key")).expect("removes");
    let dir = site.0.path().to_str().expect("UTF-8");
    let ended = run(&["tls", "init", "--data-dir", dir]);
    assert!(
        ended.stderr.contains("was not made by this command"),
        "{}",
        ended.stderr
    );
}
