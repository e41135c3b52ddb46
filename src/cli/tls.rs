//! `fieldgate tls`: creates a private CA and certificates, for tests or closed networks.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::auth::fleet_key::create_data_dir;
use crate::config::address::host_name;
use crate::config::{TLS_CERT_FILE, TLS_DIR, TLS_KEY_FILE};
use crate::sys::secret_file::{create_private_dir, create_secret, replace_secret};
use crate::time::utc_now;
use clap::{Args, Subcommand};
use jiff::ToSpan;
use jiff::civil::Date;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::device::device_name;
use super::{Error, output};

const CA_CERT_FILE: &str = "ca.pem";
const CA_KEY_FILE: &str = "ca.key";
const LOCK_FILE: &str = ".lock";
/// Default hosts of the first certificate.
const FIRST_HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Validity of the CA certificate, in days. It is long because devices store the certificate and are hard to update.
const CA_DAYS: u32 = 20 * 365;

#[derive(Debug, Subcommand)]
pub enum TlsCommand {
    /// Create a CA and a server certificate in tls/ in the data directory. Another run renews the certificate for the
    /// same hosts with the same CA; a running gateway reloads it
    Init(InitArgs),
    /// Create device certificates, for a gateway that requires them (serve --tls-client-ca). Existing files are
    /// kept unless --replace is given
    Device(DeviceArgs),
}

#[derive(Args, Debug)]
pub struct InitArgs {
    /// Host names and addresses of the gateway [default: those of the existing certificate, otherwise localhost,
    /// 127.0.0.1 and ::1]
    #[arg(value_name = "HOST", value_parser = host_name)]
    hosts: Vec<String>,

    /// Replace an existing certificate for other hosts. Without it, the command keeps the hosts that devices may
    /// be using
    #[arg(long)]
    replace: bool,

    /// Days for which the certificate is valid
    #[arg(long, value_name = "DAYS", default_value_t = 365,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(CA_DAYS)))]
    days: u32,
}

#[derive(Args, Debug)]
pub struct DeviceArgs {
    /// Names of the devices
    #[arg(value_name = "NAME", required = true, value_parser = device_name)]
    names: Vec<String>,

    /// Directory for NAME.pem and NAME.key; created if missing; must not be the data directory
    #[arg(long, value_name = "DIR", default_value = ".")]
    out_dir: PathBuf,

    /// Replace existing keys and certificates; the devices then need both new files
    #[arg(long)]
    replace: bool,

    /// Days for which the certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 3650,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(CA_DAYS)))]
    days: u32,
}

pub fn tls(data_dir: &Path, command: &TlsCommand) -> Result<(), Error> {
    match command {
        TlsCommand::Init(args) => init(data_dir, args),
        TlsCommand::Device(args) => device(data_dir, args),
    }
}

fn init(data_dir: &Path, args: &InitArgs) -> Result<(), Error> {
    create_data_dir(data_dir)?;
    let dir = data_dir.join(TLS_DIR);
    create_data_dir(&dir)?;
    let _lock = lock(&dir)?;
    let [ca_cert, ca_key, cert, key] =
        [CA_CERT_FILE, CA_KEY_FILE, TLS_CERT_FILE, TLS_KEY_FILE].map(|file| dir.join(file));
    if !ca_key.exists() {
        if let Some(foreign) = [&cert, &key, &ca_cert]
            .into_iter()
            .find(|path| path.exists())
        {
            return Err(foreign_file(foreign, "was not created by this command"));
        }
        make_authority(&ca_cert, &ca_key)?;
    }
    let authority = Authority::load(&ca_cert, &ca_key)?;
    let present = present_certificate(&authority, &cert, &key)?;
    let hosts = match (&args.hosts[..], present) {
        ([], Some(present)) => hosts_of(&cert, &present)?,
        ([], None) => FIRST_HOSTS.map(str::to_owned).to_vec(),
        (hosts, Some(present)) if !args.replace => {
            refuse_other_hosts(&hosts_of(&cert, &present)?, hosts, &cert)?;
            hosts.to_vec()
        }
        (hosts, _) => hosts.to_vec(),
    };
    let (params, valid_until) = params(hosts.clone(), "fieldgate", args.days)?;
    let issued = authority.issue(params, ExtendedKeyUsagePurpose::ServerAuth)?;
    // Write the key first: a gateway that reads both files in between sees a mismatch, keeps the old pair and
    // retries.
    replace(&key, &issued.key)?;
    replace(&cert, &issued.certificate)?;

    let mut out = output::stdout();
    writeln!(
        out,
        "CA           {} (install it on the devices)",
        ca_cert.display()
    )?;
    writeln!(
        out,
        "CA key       {} (signs all certificates: keep it safe)",
        ca_key.display()
    )?;
    let hosts = hosts.join(", ");
    writeln!(
        out,
        "certificate  {} for {hosts}, until {valid_until}",
        cert.display()
    )?;
    writeln!(out, "private key  {}", key.display())?;
    writeln!(
        out,
        "try it with  fieldgate serve --tls-listen 127.0.0.1:7301"
    )?;
    writeln!(
        out,
        "and          fieldgate-sim run --gateway localhost:7301 --tls --ca {}",
        ca_cert.display()
    )?;
    out.flush().map_err(Error::Output)
}

/// Fails if the certificate is for other hosts: devices that connect by a removed name could not reconnect.
fn refuse_other_hosts(present: &[String], wanted: &[String], cert: &Path) -> Result<(), Error> {
    let set = |hosts: &[String]| -> BTreeSet<String> {
        hosts.iter().map(|host| host.to_ascii_lowercase()).collect()
    };
    if set(present) == set(wanted) {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "{} is for {}, not for {}; use --replace for a certificate with the given hosts, or name no hosts to renew it",
        cert.display(),
        present.join(", "),
        wanted.join(", ")
    )))
}

/// Locks the directory against concurrent `fieldgate tls` commands, while the returned file is open.
fn lock(dir: &Path) -> Result<File, Error> {
    let path = dir.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    let opened = options.append(true).create(true).mode(0o600).open(&path);
    let file = opened
        .map_err(|error| Error::Failed(format!("could not lock {}: {error}", path.display())))?;
    // Some file systems do not support locks. Concurrent commands are rare, so continue without one.
    let _ = file.lock();
    Ok(file)
}

/// Returns the existing certificate, if there is one. Fails if it was not signed by this CA or if its key does not
/// match, because both files are about to be replaced.
fn present_certificate(
    authority: &Authority,
    cert: &Path,
    key: &Path,
) -> Result<Option<CertificateDer<'static>>, Error> {
    let present = match cert.exists() {
        false => None,
        true => match CertificateDer::from_pem_file(cert) {
            Ok(certificate) if authority.has_signed(&certificate) => Some(certificate),
            _ => {
                return Err(foreign_file(
                    cert,
                    "was not signed by the CA in the same directory",
                ));
            }
        },
    };
    let fits = |key: KeyPair| present.as_ref().is_some_and(|it| is_of(&key, it));
    if key.exists() && !KeyPair::from_pem(&read(key)?).is_ok_and(fits) {
        return Err(foreign_file(
            key,
            "does not match the certificate in the same directory",
        ));
    }
    Ok(present)
}

fn hosts_of(path: &Path, certificate: &CertificateDer<'_>) -> Result<Vec<String>, Error> {
    let unknown = || {
        Error::Failed(format!(
            "could not read the hosts of {}; name them: `fieldgate tls init HOST…`",
            path.display()
        ))
    };
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| unknown())?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.ok_or_else(unknown)?.value.general_names.iter();
    let hosts = names.map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes).map(|address| address.to_string()),
        _ => None,
    });
    hosts.collect::<Option<_>>().ok_or_else(unknown)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

fn device(data_dir: &Path, args: &DeviceArgs) -> Result<(), Error> {
    let dir = data_dir.join(TLS_DIR);
    let [ca_cert, ca_key] = [CA_CERT_FILE, CA_KEY_FILE].map(|file| dir.join(file));
    if !ca_key.exists() {
        return Err(Error::Failed(format!(
            "could not find CA key {}; run `fieldgate tls init` first",
            ca_key.display()
        )));
    }
    // A device may have the name of one of the gateway's own files.
    if [data_dir, &dir]
        .iter()
        .any(|own| is_same(own, &args.out_dir))
    {
        return Err(Error::Failed(format!(
            "{} holds the gateway's own keys; choose another --out-dir",
            args.out_dir.display()
        )));
    }
    let authority = Authority::load(&ca_cert, &ca_key)?;
    create_private_dir(&args.out_dir).map_err(|error| {
        Error::Failed(format!(
            "could not write the directory {}: {error}; choose another --out-dir",
            args.out_dir.display()
        ))
    })?;
    // Write all files before the output, so that a closed stdout does not leave some of them out.
    let lines = make_pairs(&authority, args)?;
    let mut out = output::stdout();
    out.write_all(lines.as_bytes())?;
    out.flush().map_err(Error::Output)
}

/// Creates the files. Returns a line for each device.
fn make_pairs(authority: &Authority, args: &DeviceArgs) -> Result<String, Error> {
    let mut named = HashSet::new();
    let names = args.names.iter().filter(|name| named.insert(*name));
    let with_files = |name| {
        let file = |end| args.out_dir.join(format!("{name}.{end}"));
        (name, file("pem"), file("key"))
    };
    let pairs: Vec<(&String, PathBuf, PathBuf)> = names.map(with_files).collect();
    // Create all files or none, as far as that can be checked beforehand.
    let mut files = pairs.iter().flat_map(|(_, cert, key)| [cert, key]);
    if let Some(existing) = files.find(|path| !args.replace && fs::symlink_metadata(path).is_ok()) {
        return Err(is_there(existing));
    }
    let put = if args.replace { replace } else { create };
    let mut lines = String::new();
    for (name, cert, key) in &pairs {
        let (params, until) = params(Vec::new(), name, args.days)?;
        let issued = authority.issue(params, ExtendedKeyUsagePurpose::ClientAuth)?;
        put(key, &issued.key)?;
        put(cert, &issued.certificate)?;
        let (cert, key) = (cert.display(), key.display());
        lines.push_str(&format!("{cert} and {key}, until {until}\n"));
    }
    Ok(lines)
}

/// Returns whether two paths lead to the same directory; `false` if one does not exist.
fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino()))
    };
    id(one).is_some_and(|one| id(other) == Some(one))
}

/// Returns the parameters of a certificate and its last valid day.
fn params(hosts: Vec<String>, name: &str, days: u32) -> Result<(CertificateParams, Date), Error> {
    let mut params = CertificateParams::new(hosts).map_err(cannot_make)?;
    params.distinguished_name.push(DnType::CommonName, name);
    let today = utc_now().to_zoned(jiff::tz::TimeZone::UTC).date();
    // Valid from two days ago, for devices with slow clocks.
    let (from, until) = (today - 2.days(), today + i64::from(days).days());
    let moment = |date: Date| {
        let (month, day) = (date.month().unsigned_abs(), date.day().unsigned_abs());
        date_time_ymd(date.year().into(), month, day)
    };
    (params.not_before, params.not_after) = (moment(from), moment(until));
    Ok((params, until))
}

fn make_authority(cert: &Path, key: &Path) -> Result<(), Error> {
    let (mut params, _) = params(Vec::new(), "Fieldgate authority of this site", CA_DAYS)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let signing = KeyPair::generate().map_err(cannot_make)?;
    let certificate = params.self_signed(&signing).map_err(cannot_make)?;
    // Never overwrite files. Write the key last: its existence shows that both files are complete.
    for (path, text) in [(cert, certificate.pem()), (key, signing.serialize_pem())] {
        create_secret(path, &text).map_err(|error| cannot_write(path, &error))?;
    }
    Ok(())
}

/// A certificate and its private key, as PEM.
struct Issued {
    certificate: String,
    key: String,
}

/// The private CA.
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn load(cert: &Path, key: &Path) -> Result<Authority, Error> {
        let signing = KeyPair::from_pem(&read(key)?).map_err(cannot_make)?;
        let text = read(cert)?;
        let certificate = CertificateDer::from_pem_slice(text.as_bytes());
        // Devices would reject certificates signed with another key.
        let certificate = certificate.ok().filter(|it| is_of(&signing, it));
        let certificate = certificate.ok_or_else(|| {
            Error::Failed(format!(
                "{} does not match {}; restore the matching file",
                key.display(),
                cert.display()
            ))
        })?;
        let issuer = Issuer::from_ca_cert_der(&certificate, signing).map_err(cannot_make)?;
        Ok(Authority {
            certificate,
            issuer,
        })
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<Issued, Error> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(cannot_make)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(cannot_make)?;
        Ok(Issued {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    fn has_signed(&self, certificate: &CertificateDer<'_>) -> bool {
        let parsed = [&self.certificate, certificate].map(|it| X509Certificate::from_der(it));
        let [Ok((_, own)), Ok((_, other))] = parsed else {
            return false;
        };
        let signed = other.verify_signature(Some(own.public_key()));
        other.issuer() == own.subject() && signed.is_ok()
    }
}

fn is_of(key: &KeyPair, certificate: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| {
        *certificate.public_key().subject_public_key.data == *key.public_key_raw()
    })
}

fn read(path: &Path) -> Result<String, Error> {
    let unreadable = |error| Error::Failed(format!("could not read {}: {error}", path.display()));
    fs::read_to_string(path).map_err(unreadable)
}

/// Creates a private file (mode 0600); fails if it exists.
fn create(path: &Path, text: &str) -> Result<(), Error> {
    create_secret(path, text).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => is_there(path),
        _ => cannot_write(path, &error),
    })
}

/// Creates or replaces a private file (mode 0600) atomically.
fn replace(path: &Path, text: &str) -> Result<(), Error> {
    replace_secret(path, text).map_err(|error| cannot_write(path, &error))
}

fn foreign_file(path: &Path, why: &str) -> Error {
    Error::Failed(format!(
        "{} exists and {why}, not replaced; move it away, or choose another --data-dir",
        path.display()
    ))
}

fn is_there(path: &Path) -> Error {
    Error::Failed(format!(
        "{} already exists; use --replace to replace it",
        path.display()
    ))
}

fn cannot_write(path: &Path, error: &io::Error) -> Error {
    Error::Failed(format!("could not write {}: {error}", path.display()))
}

fn cannot_make(error: rcgen::Error) -> Error {
    Error::Failed(format!("could not create certificate: {error}"))
}
