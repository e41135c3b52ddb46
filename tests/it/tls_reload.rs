//! Certificates that a running gateway can load only later, or not at all.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use rcgen::{CertificateParams, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::CertificateDer;

use crate::support::client::Link;
use crate::support::gateway::{Ended, Gateway};
use crate::tls::{Site, until};

const NOT_TAKEN: &str = "could not load new certificate, keeping the old one";
const TAKEN: &str = "certificate reloaded";

/// Returns the certificate that a new connection gets.
fn shown(site: &Site, gateway: &Gateway) -> CertificateDer<'static> {
    let (link, _) = Link::open_tls(gateway.tls_addr(), &site.client()).expect("TLS");
    link.certificate()
}

fn chmod(site: &Site, mode: u32) {
    let key = site.path("tls/server.key");
    fs::set_permissions(key, Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn c07_a_key_fixed_by_chmod_is_loaded() {
    let site = Site::new();
    let mut gateway = site.start(&[]);
    chmod(&site, 0o644);
    gateway.wait_for_line(NOT_TAKEN);
    // The load is retried, but logged at a lower level.
    for _ in 0..2 {
        gateway.wait_for_line("could not reload certificate");
    }
    chmod(&site, 0o600);
    gateway.wait_for_line(TAKEN);

    // Another pair, whose key others can read until an operator fixes it.
    let first = shown(&site, &gateway);
    let before = ["server.key", "server.pem"].map(|file| site.path("tls").join(file));
    let before = before.map(|path| (fs::read(&path).expect("reads"), path));
    site.tls(&["init"]);
    let second = until(|| Some(shown(&site, &gateway)).filter(|it| *it != first));
    chmod(&site, 0o644);
    gateway.wait_for_line("run chmod 600");
    for (bytes, path) in before {
        fs::write(path, bytes).expect("writes");
    }
    assert_eq!(shown(&site, &gateway), second);
    chmod(&site, 0o600);
    until(|| Some(shown(&site, &gateway)).filter(|it| *it == first));

    gateway.terminate();
    let Ended { stderr, .. } = gateway.wait();
    let (earlier, _) = stderr.split_once(TAKEN).expect("waited for");
    assert_eq!(earlier.matches(NOT_TAKEN).count(), 1, "{earlier}");
}

#[test]
fn c07_an_expired_certificate_does_not_replace_a_valid_one() {
    let site = Site::new();
    let mut gateway = site.start(&[]);
    let first = shown(&site, &gateway);
    let read = |file: &str| fs::read_to_string(site.path("tls").join(file)).expect("reads");
    let good = read("server.pem");
    let [ca_key, key] =
        ["ca.key", "server.key"].map(|file| KeyPair::from_pem(&read(file)).expect("a key"));
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).expect("an authority");
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    params.not_after = date_time_ymd(2020, 1, 1);
    let expired = params.signed_by(&key, &issuer).expect("signs");
    fs::write(site.path("tls/server.pem"), expired.pem()).expect("writes");
    gateway.wait_for_line("expired on 2020-01-01T00:00:00Z");
    assert_eq!(shown(&site, &gateway), first);
    // A signal does not change that.
    gateway.signal("HUP");
    gateway.wait_for_line("expired on 2020-01-01T00:00:00Z");
    assert_eq!(shown(&site, &gateway), first);
    fs::write(site.path("tls/server.pem"), good).expect("writes");
    gateway.wait_for_line(TAKEN);
}
