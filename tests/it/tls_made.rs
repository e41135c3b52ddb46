//! `fieldgate tls`: the files that it creates, and those that it leaves unchanged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::CertifiedKey;
use tempfile::TempDir;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME;
use x509_parser::prelude::FromDer;

use crate::support::gateway::{Ended, command, run};
use crate::tls::{Site, private_key};

/// Returns the content of every file of a directory, by name.
fn files(dir: &Path) -> BTreeMap<PathBuf, String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let texts = paths.filter(|path| path.is_file()).map(|path| {
        let text = std::fs::read_to_string(&path).expect("a text");
        (path, text)
    });
    texts.collect()
}

/// Runs `fieldgate tls device …` with the CA in `data_dir`.
fn device(data_dir: &str, args: &[&str]) -> Ended {
    run(&[&["tls", "device", "--data-dir", data_dir][..], args].concat())
}

#[test]
fn device_certificates_replace_files_only_on_request() {
    let site = Site::new();
    std::fs::write(site.path("fleet.key"), "ab".repeat(32)).expect("writes");
    let dir = site.0.path().to_str().expect("UTF-8");
    let device = |args: &[&str]| device(dir, args);
    let refused = |args: &[&str], says: &str| {
        let ended = device(args);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
    };
    // Never the gateway's own files, under any path.
    let link = site.path("link");
    std::os::unix::fs::symlink(site.path("tls"), &link).expect("links");
    let before = (files(site.0.path()), files(&site.path("tls")));
    for own in [site.0.path(), &site.path("tls"), &link] {
        let own = own.to_str().expect("UTF-8");
        for name in ["fleet", "ca", "server", "new"] {
            let args = [name, "--out-dir", own, "--replace"];
            refused(&args, "choose another --out-dir");
            refused(&args[..3], "choose another --out-dir");
        }
    }
    // Compared without being printed: the files contain keys.
    assert!(before == (files(site.0.path()), files(&site.path("tls"))));

    // A device's files only on request; if one of several exists, none is replaced.
    let out = site.path("devices");
    let out_dir = ["--out-dir", out.to_str().expect("UTF-8")];
    let ended = device(&[&["pump", "pump", "valve"][..], &out_dir].concat());
    assert!(ended.status.success(), "{ended:?}");
    let made = files(&out);
    assert_eq!(made.len(), 4);
    std::fs::remove_file(out.join("valve.key")).expect("removes");
    let left = files(&out);
    for names in [&["new", "pump"][..], &["valve"]] {
        let args = [names, &out_dir].concat();
        refused(&args, "already exists; use --replace");
    }
    assert!(files(&out) == left);
    let ended = device(&[&["pump", "valve", "--replace"][..], &out_dir].concat());
    assert!(ended.status.success(), "{ended:?}");
    let remade = files(&out);
    assert!(remade.keys().eq(made.keys()));
    assert!(remade.iter().all(|(path, text)| made[path] != *text));
}

#[test]
fn device_certificates_are_created_even_if_the_output_is_closed() {
    let site = Site::new();
    let dir = site.0.path().to_str().expect("UTF-8");
    let out = site.path("devices");
    let out_dir = out.to_str().expect("UTF-8");
    // More lines than the output buffer holds.
    let names: Vec<String> = (0..100).map(|number| format!("pump-{number}")).collect();
    let mut made = command(&["tls", "device", "--data-dir", dir, "--out-dir", out_dir]);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = made.args(&names).stdout(writer).status();
    assert!(status.expect("starts").success());
    assert_eq!(files(&out).len(), 2 * names.len());

    let ended = device(dir, &["pump", "--out-dir", "/proc/nope"]);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(
        ended
            .stderr
            .trim_end()
            .ends_with("choose another --out-dir"),
        "{}",
        ended.stderr
    );
}

/// Returns the hosts of a certificate, as encoded.
fn hosts(cert: &Path) -> Vec<u8> {
    let cert = CertificateDer::from_pem_file(cert).expect("a certificate");
    let (_, cert) = X509Certificate::from_der(&cert).expect("a certificate");
    let extensions = cert.extensions().iter();
    let mut names = extensions.filter(|it| it.oid == OID_X509_EXT_SUBJECT_ALT_NAME);
    names.next().expect("hosts").value.to_vec()
}

/// Returns whether a key belongs to a certificate.
fn fit(cert: &Path, key: &Path) -> bool {
    let cert = CertificateDer::from_pem_file(cert).expect("a certificate");
    CertifiedKey::from_der(vec![cert], private_key(key), &ring::default_provider()).is_ok()
}

#[test]
fn a_renewed_certificate_has_the_same_hosts() {
    let site = Site::new();
    let cert = site.path("tls/server.pem");
    let first = hosts(&cert);
    let wanted = ["gate.example.com", "10.0.0.7", "fd00::7", "--replace"];
    site.tls(&[&["init"][..], &wanted].concat());
    let named = hosts(&cert);
    assert_ne!(named, first);
    let before = std::fs::read(&cert).expect("a certificate");
    site.tls(&["init"]);
    assert_ne!(std::fs::read(&cert).expect("a certificate"), before);
    assert_eq!(hosts(&cert), named);
    // They change only if they are given.
    let dir = site.0.path().to_str().expect("UTF-8");
    let init = |hosts: &[&str]| run(&[&["tls", "init", "--data-dir", dir][..], hosts].concat());
    let before = std::fs::read(&cert).expect("a certificate");
    for hosts in [&["gate.example.org"][..], &["gate.example.com"]] {
        let ended = init(hosts);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(
            ended
                .stderr
                .contains("is for gate.example.com, 10.0.0.7, fd00::7")
        );
        assert!(ended.stderr.contains("--replace"), "{}", ended.stderr);
    }
    assert_eq!(std::fs::read(&cert).expect("a certificate"), before);
    // The same hosts in another order renew it.
    site.tls(&["init", "10.0.0.7", "FD00::7", "Gate.Example.Com"]);
    site.tls(&["init", "gate.example.org", "--replace"]);
    assert_ne!(hosts(&cert), named);
}

/// A name in a certificate that no device can use is a mistake, not a host.
#[test]
fn hosts_are_names_and_addresses() {
    let dir = TempDir::new().expect("a directory");
    for (host, says) in [
        (
            "https://gate.example.com:7301/x",
            "only the host: gate.example.com",
        ),
        ("gate.example.com:7301", "path: gate.example.com"),
        ("[::1]", "omit the brackets: ::1"),
        ("", "host name is empty"),
    ] {
        let path = dir.path().join("data");
        let path = path.to_str().expect("UTF-8");
        let ended = run(&["tls", "init", "--data-dir", path, host]);
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
        assert!(!dir.path().join("data").exists());
    }
}

#[test]
fn files_of_others_are_not_replaced() {
    let site = Site::new();
    let other = Site::new();
    let dir = site.0.path().to_str().expect("UTF-8");
    let own = files(&site.path("tls"));
    for (foreign, says) in [
        (
            &["server.pem", "server.key"][..],
            "server.pem exists and was not signed",
        ),
        (&["server.key"], "server.key exists and does not match"),
        (&["ca.key"], "does not match"),
        (&["ca.pem"], "does not match"),
        (
            &["ca.pem", "ca.key"],
            "server.pem exists and was not signed",
        ),
    ] {
        for file in foreign {
            let from = other.path("tls").join(file);
            std::fs::copy(from, site.path("tls").join(file)).expect("copies");
        }
        let before = files(&site.path("tls"));
        for args in [&["tls", "init"][..], &["tls", "init", "localhost"]] {
            let ended = run(&[args, &["--data-dir", dir]].concat());
            assert_eq!(ended.status.code(), Some(1), "{foreign:?}: {ended:?}");
            assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
            assert!(ended.stderr.contains(says), "{foreign:?}: {}", ended.stderr);
        }
        // Compared without being printed: the files contain keys.
        assert!(files(&site.path("tls")) == before, "{foreign:?}");
        for (path, text) in &own {
            std::fs::write(path, text).expect("writes");
        }
    }
    // With another CA's key, no device certificates are created either.
    std::fs::copy(other.path("tls/ca.key"), site.path("tls/ca.key")).expect("copies");
    let out = site.path("devices");
    let out_dir = out.to_str().expect("UTF-8");
    let ended = device(dir, &["pump", "--out-dir", out_dir]);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(!out.exists());
}

#[test]
fn concurrent_runs_create_one_ca() {
    for _ in 0..5 {
        let site = Site(TempDir::new().expect("a directory"));
        let dir = site.0.path().to_str().expect("UTF-8");
        let args = ["tls", "init", "--data-dir", dir];
        thread::scope(|scope| {
            let inits: [_; 6] = std::array::from_fn(|_| scope.spawn(|| run(&args)));
            for init in inits {
                let ended = init.join().expect("ends");
                assert!(ended.status.success(), "{ended:?}");
            }
        });
        for name in ["ca", "server"] {
            let [cert, key] =
                ["pem", "key"].map(|end| site.path("tls").join(format!("{name}.{end}")));
            assert!(fit(&cert, &key), "{name}");
        }
        // The certificate is signed by that CA.
        site.tls(&["init"]);
    }
}
