//! `fieldgate tls`: certificates of one's own making, to try TLS with, or for a closed network.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use fieldgate::config::{TLS_CERT_FILE, TLS_DIR, TLS_KEY_FILE};
use fieldgate::keys::{create_data_dir, write_secret};
use jiff::civil::Date;
use jiff::{Timestamp, ToSpan};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use super::device::device_name;
use super::{Error, output};

const CA_CERT_FILE: &str = "ca.pem";
const CA_KEY_FILE: &str = "ca.key";
/// The authority's certificate is in devices, where it is not easily changed.
const CA_DAYS: u32 = 20 * 365;

#[derive(Debug, Subcommand)]
pub enum TlsCommand {
    /// Make a certificate for the gateway, and an authority that signs it, into tls/ in the data
    /// directory. Again later, a new certificate by the same authority; a gateway that runs takes it
    Init(InitArgs),
    /// Make certificates for devices, for a gateway that asks for them (serve --tls-client-ca). Files that are
    /// there stay, unless --replace is given
    Device(DeviceArgs),
}

#[derive(Args, Debug)]
pub struct InitArgs {
    /// Names and addresses by which devices reach the gateway
    #[arg(value_name = "HOST", default_values = ["localhost", "127.0.0.1", "::1"])]
    hosts: Vec<String>,

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

    /// Directory for NAME.pem and NAME.key; it is made if it is missing, and must not be the data directory
    #[arg(long, value_name = "DIR", default_value = ".")]
    out_dir: PathBuf,

    /// Make new keys and certificates also where there are some; those devices need both new files
    #[arg(long)]
    replace: bool,

    /// Days for which the certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 3650,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(CA_DAYS)))]
    days: u32,
}

/// Does what was asked for.
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
    let [ca_cert, ca_key, cert, key] =
        [CA_CERT_FILE, CA_KEY_FILE, TLS_CERT_FILE, TLS_KEY_FILE].map(|file| dir.join(file));
    if ca_key.exists() {
        // Goes on with the authority that devices know.
    } else if let Some(foreign) = [&cert, &key, &ca_cert]
        .into_iter()
        .find(|path| path.exists())
    {
        return Err(Error::Failed(format!(
            "{} is there and was not made by this command, which leaves it alone; move it away, or give \
             another --data-dir",
            foreign.display()
        )));
    } else {
        make_authority(&ca_cert, &ca_key)?;
    }
    let (params, valid_until) = params(args.hosts.clone(), "fieldgate", args.days)?;
    let issued = issue(
        params,
        ExtendedKeyUsagePurpose::ServerAuth,
        &ca_cert,
        &ca_key,
    )?;
    // The key first: a gateway that looks in between keeps what it has, and looks again.
    replace(&key, &issued.key)?;
    replace(&cert, &issued.certificate)?;

    let mut out = output::stdout();
    writeln!(out, "authority    {} (devices need it)", ca_cert.display())?;
    writeln!(
        out,
        "its key      {} (signs all others: keep it safe)",
        ca_key.display()
    )?;
    let hosts = args.hosts.join(", ");
    writeln!(
        out,
        "certificate  {} for {hosts}, until {valid_until}",
        cert.display()
    )?;
    writeln!(out, "its key      {}", key.display())?;
    writeln!(
        out,
        "try it by    fieldgate serve --tls-listen 127.0.0.1:7301"
    )?;
    writeln!(
        out,
        "and          fieldgate-sim run --gateway localhost:7301 --tls --ca {}",
        ca_cert.display()
    )?;
    out.flush().map_err(Error::Output)
}

fn device(data_dir: &Path, args: &DeviceArgs) -> Result<(), Error> {
    let dir = data_dir.join(TLS_DIR);
    let [ca_cert, ca_key] = [CA_CERT_FILE, CA_KEY_FILE].map(|file| dir.join(file));
    if !ca_key.exists() {
        return Err(Error::Failed(format!(
            "there is no {}, which signs certificates; `fieldgate tls init` makes one",
            ca_key.display()
        )));
    }
    // A device may be named like the gateway's own files.
    if [data_dir, &dir]
        .iter()
        .any(|own| is_same(own, &args.out_dir))
    {
        return Err(Error::Failed(format!(
            "{} is where the gateway keeps its own keys; give another --out-dir",
            args.out_dir.display()
        )));
    }
    create_data_dir(&args.out_dir)?;
    let mut named = HashSet::new();
    let pairs: Vec<(&String, [PathBuf; 2])> = args
        .names
        .iter()
        .filter(|name| named.insert(*name))
        .map(|name| {
            let pair = ["pem", "key"].map(|end| args.out_dir.join(format!("{name}.{end}")));
            (name, pair)
        })
        .collect();
    // All or none, where that can be known.
    let mut files = pairs.iter().flat_map(|(_, pair)| pair);
    if let Some(there) = files.find(|path| !args.replace && fs::symlink_metadata(path).is_ok()) {
        return Err(is_there(there));
    }
    let put = if args.replace { replace } else { create };
    let mut out = output::stdout();
    for (name, [cert, key]) in &pairs {
        let (params, valid_until) = params(Vec::new(), name, args.days)?;
        let issued = issue(
            params,
            ExtendedKeyUsagePurpose::ClientAuth,
            &ca_cert,
            &ca_key,
        )?;
        put(key, &issued.key)?;
        put(cert, &issued.certificate)?;
        writeln!(
            out,
            "{} and {}, until {valid_until}",
            cert.display(),
            key.display()
        )?;
    }
    out.flush().map_err(Error::Output)
}

/// Whether two paths lead to one directory; what is not there is no other's.
fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino()))
    };
    id(one).is_some_and(|one| id(other) == Some(one))
}

/// What is signed, and its last day.
fn params(hosts: Vec<String>, name: &str, days: u32) -> Result<(CertificateParams, Date), Error> {
    let mut params = CertificateParams::new(hosts).map_err(cannot_make)?;
    params.distinguished_name.push(DnType::CommonName, name);
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    // A clock that is a little behind shall take it, too.
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
    replace(cert, &certificate.pem())?;
    replace(key, &signing.serialize_pem())
}

/// As PEM.
struct Issued {
    certificate: String,
    key: String,
}

fn issue(
    mut params: CertificateParams,
    usage: ExtendedKeyUsagePurpose,
    ca_cert: &Path,
    ca_key: &Path,
) -> Result<Issued, Error> {
    let read = |path: &Path| {
        let unreadable = |error| Error::Failed(format!("cannot read {}: {error}", path.display()));
        fs::read_to_string(path).map_err(unreadable)
    };
    let signing = KeyPair::from_pem(&read(ca_key)?).map_err(cannot_make)?;
    let issuer = Issuer::from_ca_cert_pem(&read(ca_cert)?, signing).map_err(cannot_make)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(cannot_make)?;
    let certificate = params.signed_by(&key, &issuer).map_err(cannot_make)?;
    Ok(Issued {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// Makes a file that nobody else may touch, where there is none.
fn create(path: &Path, text: &str) -> Result<(), Error> {
    write_secret(path, text).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => is_there(path),
        _ => cannot_write(path, &error),
    })
}

/// Puts a file there whole, in the place of one that may be there; nobody else may touch it.
fn replace(path: &Path, text: &str) -> Result<(), Error> {
    let draft = path.with_extension(format!("{}.new", std::process::id()));
    let written = write_secret(&draft, text).and_then(|()| fs::rename(&draft, path));
    written.map_err(|error| cannot_write(path, &error))
}

fn is_there(path: &Path) -> Error {
    Error::Failed(format!(
        "{} is there already and is left alone; --replace makes another in its place",
        path.display()
    ))
}

fn cannot_write(path: &Path, error: &io::Error) -> Error {
    Error::Failed(format!("cannot write {}: {error}", path.display()))
}

fn cannot_make(error: rcgen::Error) -> Error {
    Error::Failed(format!("cannot make a certificate: {error}"))
}
