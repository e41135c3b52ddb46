use std::os::unix::fs::PermissionsExt;

use jiff::ToSpan;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::{NamedTempFile, TempDir};

use super::*;

/// Year in which a valid certificate expires.
const EXPIRES: i32 = 2100;

/// A certificate and its key, in a directory that exists until drop.
struct Site(TempDir);

impl Site {
    fn new() -> Site {
        let site = Site(tempfile::tempdir().unwrap());
        site.put(EXPIRES);
        site
    }

    fn files(&self) -> TlsFiles {
        TlsFiles {
            cert: self.0.path().join("server.pem"),
            key: self.0.path().join("server.key"),
            client_ca: None,
            key_readers: SecretReaders::default(),
        }
    }

    /// Writes a new pair.
    fn put(&self, expires: i32) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) =
            (date_time_ymd(2000, 1, 1), date_time_ymd(expires, 1, 1));
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        fs::write(self.files().key, key.serialize_pem()).unwrap();
        fs::write(self.files().cert, cert.pem()).unwrap();
        self.chmod(0o600);
    }

    fn chmod(&self, mode: u32) {
        fs::set_permissions(self.files().key, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn load(&self) -> Tls {
        Tls::load(self.files(), 4096).unwrap()
    }
}

/// Checks the files; returns the log of this check, from level INFO.
fn look(watch: &mut Watch<'_>, now: Timestamp) -> String {
    let log = NamedTempFile::new().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(Arc::new(log.reopen().unwrap()))
        .finish();
    tracing::subscriber::with_default(subscriber, || watch.look(now));
    fs::read_to_string(log.path()).unwrap()
}

fn config(tls: &Tls) -> Arc<ServerConfig> {
    Arc::clone(&tls.current.read().unwrap().config)
}

fn expires() -> Timestamp {
    format!("{EXPIRES}-01-01T00:00:00Z").parse().unwrap()
}

#[test]
fn changes_before_the_first_check_are_noticed() {
    let site = Site::new();
    let tls = site.load();
    let before = config(&tls);
    site.put(EXPIRES);
    let now = Timestamp::now();
    let mut watch = Watch::new(&tls, now);
    let log = look(&mut watch, now);
    assert!(log.contains("certificate reloaded"), "{log}");
    assert!(!Arc::ptr_eq(&before, &config(&tls)));
    assert_eq!(look(&mut watch, now), "");
}

#[test]
fn a_failed_load_is_logged_once_and_retried() {
    let site = Site::new();
    let tls = site.load();
    let now = Timestamp::now();
    let mut watch = Watch::new(&tls, now);
    site.chmod(0o644);
    let log = look(&mut watch, now);
    assert!(log.contains("run chmod 600"), "{log}");
    assert_eq!(look(&mut watch, now), "");
    // Each attempt by the operator is logged.
    site.chmod(0o640);
    let log = look(&mut watch, now);
    assert!(log.contains("its group can read it"), "{log}");
    // Retried even if the files' stamps do not show the correction.
    site.chmod(0o600);
    watch.seen = stamps(&tls.sources().0);
    let log = look(&mut watch, now);
    assert!(log.contains("certificate reloaded"), "{log}");
    assert_eq!(look(&mut watch, now), "");
}

#[test]
fn an_expired_certificate_replaces_only_an_expired_one() {
    let site = Site::new();
    let tls = site.load();
    let before = config(&tls);
    let now = Timestamp::now();
    let mut watch = Watch::new(&tls, now);
    site.put(2020);
    let log = look(&mut watch, now);
    assert!(log.contains("expired on 2020-01-01"), "{log}");
    assert!(Arc::ptr_eq(&before, &config(&tls)));
    let log = look(&mut watch, expires());
    assert!(log.contains("certificate reloaded"), "{log}");
    assert!(log.contains("devices will not connect"), "{log}");
}

#[test]
fn expiry_is_logged_each_day_before_it() {
    let site = Site::new();
    let tls = site.load();
    let days_left = |days: i64| expires() - (24 * days).hours();
    let mut watch = Watch::new(&tls, days_left(17));
    let logged: Vec<(i64, String)> = (-2..=16)
        .rev()
        .map(|days| (days, look(&mut watch, days_left(days))))
        .collect();
    for (days, log) in logged {
        let says = match days {
            14.. => "",
            1.. => "the certificate expires soon",
            _ => "the certificate has expired",
        };
        assert_eq!(log.lines().count(), usize::from(days < 14), "{days}: {log}");
        assert!(log.contains(says), "{days}: {log}");
    }
    // Not more than once a day.
    assert_eq!(look(&mut watch, days_left(-2) + 23.hours()), "");
}

#[test]
fn invalid_pem_is_reported_without_its_content() {
    let site = Site::new();
    let tls = site.load();
    let TlsFiles { cert, key, .. } = site.files();
    for (text, says) in [
        ("", "file contains none"),
        (
            "-----BEGIN CERTIFICATE-----\nAAAA\n",
            "unterminated PEM section",
        ),
        ("-----BEGIN CERTIFICATE\nAAAA\n", "invalid header"),
        (
            "-----BEGIN CERTIFICATE-----\nA!AA\n-----END CERTIFICATE-----\n",
            "is not valid base64",
        ),
    ] {
        let key_text = text.replace("CERTIFICATE", "PRIVATE KEY");
        for (path, text) in [(&key, &key_text[..]), (&cert, text)] {
            fs::write(path, text).unwrap();
            let said = tls.reload(Timestamp::now()).unwrap_err().to_string();
            assert!(said.ends_with(says), "{said}");
            assert!(!said.contains('['), "{said}");
            site.put(EXPIRES);
        }
    }
}

/// Returns a CA certificate, an intermediate certificate issued by it, and a gateway certificate
/// issued by the latter.
fn chain() -> [CertificateDer<'static>; 3] {
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params
    };
    let [root_key, middle_key, own_key] = [(); 3].map(|()| KeyPair::generate().unwrap());
    let root = authority("root").self_signed(&root_key).unwrap();
    let (root_params, middle_params) = (authority("root"), authority("middle"));
    let by_root = Issuer::from_params(&root_params, &root_key);
    let middle = middle_params.signed_by(&middle_key, &by_root).unwrap();
    let by_middle = Issuer::from_params(&middle_params, &middle_key);
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let own = own.signed_by(&own_key, &by_middle).unwrap();
    [own, middle, root].map(|certificate| certificate.der().clone())
}

#[test]
fn faults_that_keep_devices_from_connecting_are_found_in_the_chain() {
    let [own, middle, root] = chain();
    let now = Timestamp::now();
    let found = |chain: &[&CertificateDer<'static>], known: &[CertificateDer<'static>]| {
        let chain: Vec<_> = chain.iter().map(|der| (*der).clone()).collect();
        faults(&chain, known, now)
    };
    for chain in [&[&own, &middle][..], &[&own, &middle, &root], &[&root]] {
        assert_eq!(found(chain, &[]), Vec::<String>::new());
    }
    let missing = found(&[&own], std::slice::from_ref(&root));
    assert!(missing[0].contains("CN=middle") && missing[0].contains("intermediate"));
    assert_eq!(missing.len(), 1);
    // Devices have the issuer's certificate, which was created together with the gateway's.
    assert!(found(&[&own], std::slice::from_ref(&middle)).is_empty());
    for chain in [&[&own, &root][..], &[&own, &root, &middle]] {
        let wrong = found(chain, &[]);
        assert!(
            wrong[0].starts_with("certificate 1 was issued by \"CN=middle\""),
            "{wrong:?}"
        );
    }
    let early = Timestamp::from_second(0).unwrap();
    let not_yet = faults(&[own, middle], &[], early);
    assert_eq!(not_yet.len(), 2, "{not_yet:?}");
    assert!(not_yet[0].contains("is not valid before"));
}
