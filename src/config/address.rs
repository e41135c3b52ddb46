//! Parses addresses and host names.
//!
//! Parsing does no lookup; a name is resolved when it is used.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;

/// Address of the HTTP listener, or `off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpAddress {
    /// No listener.
    Off,
    /// The listener's address.
    On(ListenAddress),
}

impl FromStr for HttpAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<HttpAddress, String> {
        match text {
            "off" => Ok(HttpAddress::Off),
            address => address.parse().map(HttpAddress::On),
        }
    }
}

/// Longest host name (RFC 1035, section 2.3.4).
const NAME_BYTES_MAX: usize = 253;
/// Longest label of a host name (RFC 1035, section 2.3.4).
const LABEL_BYTES_MAX: usize = 63;

/// Address of a listener: `IP:PORT`, `HOST:PORT`, or `:PORT` for all addresses of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Every,
    Ip(IpAddr),
    Name(String),
}

impl From<SocketAddr> for ListenAddress {
    fn from(address: SocketAddr) -> ListenAddress {
        ListenAddress {
            host: Host::Ip(address.ip()),
            port: address.port(),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<ListenAddress, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(address.into());
        }
        let expected = "use IP:PORT, HOST:PORT, or :PORT for all addresses of this machine";
        if text.contains("://") {
            return Err(format!("not an address but a URL; {expected}"));
        }
        if let Ok(port) = text.parse::<u16>() {
            return Err(format!(
                "host is missing; use 127.0.0.1:{port} for local connections only, or :{port} for all addresses"
            ));
        }
        if text.parse::<IpAddr>().is_ok() || text.contains(':') && text.matches(':').count() > 1 {
            return Err(format!(
                "{expected}; put an IPv6 address in brackets, such as [::1]:7300"
            ));
        }
        let (host, port) = text.rsplit_once(':').ok_or(expected)?;
        let port = port
            .parse()
            .map_err(|_| format!("port must be a number up to 65535; {expected}"))?;
        let host = match host {
            "" => Host::Every,
            name => Host::Name(host_name(name)?),
        };
        Ok(ListenAddress { host, port })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.host {
            Host::Every => write!(f, ":{port}"),
            Host::Ip(ip) => SocketAddr::new(*ip, port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{port}"),
        }
    }
}

impl ListenAddress {
    /// Returns the address to bind. For a name with several addresses, this is the first IPv4 address.
    ///
    /// # Errors
    /// The name cannot be resolved.
    pub fn resolve(&self) -> io::Result<SocketAddr> {
        match &self.host {
            // An IPv6 socket also accepts IPv4, if the machine has IPv6.
            Host::Every if UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok() => {
                Ok(SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port)))
            }
            Host::Every => Ok(SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.port))),
            Host::Ip(ip) => Ok(SocketAddr::new(*ip, self.port)),
            Host::Name(name) => {
                let found: Vec<SocketAddr> =
                    (name.as_str(), self.port).to_socket_addrs()?.collect();
                preferred(&found).ok_or_else(|| io::Error::other("name does not resolve"))
            }
        }
    }
}

/// Returns the first IPv4 address, or the first address if there is no IPv4 address.
fn preferred(found: &[SocketAddr]) -> Option<SocketAddr> {
    let v4 = found.iter().find(|address| address.is_ipv4());
    v4.or(found.first()).copied()
}

/// Parses a host of a certificate: a DNS name, which may begin with `*.`, or an IP address. Returns it in lower
/// case.
///
/// # Errors
/// Returns one line with the fault and, if known, the correct form.
pub fn host_name(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("host name is empty".to_owned());
    }
    let unbracketed = text.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    if let Some(address) = unbracketed.filter(|it| it.parse::<Ipv6Addr>().is_ok()) {
        return Err(format!("omit the brackets: {address}"));
    }
    if let Some((_, rest)) = text.split_once("://") {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = without_port(host);
        return Err(format!(
            "not a host name but a URL; use only the host: {host}"
        ));
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return match address.is_unspecified() {
            true => Err(
                "devices cannot connect to this address; use one that they can reach".to_owned(),
            ),
            false => Ok(address.to_string()),
        };
    }
    if text.contains([':', '/']) {
        let host = without_port(text.split('/').next().unwrap_or_default());
        return Err(format!("use only the host, without port or path: {host}"));
    }
    dns_name(text)
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) => {
            host.trim_matches(['[', ']'])
        }
        _ => host,
    }
}

fn dns_name(text: &str) -> Result<String, String> {
    if !text.is_ascii() {
        return Err("DNS names must be ASCII; use the punycode form (xn--…)".to_owned());
    }
    let name = text.strip_suffix('.').unwrap_or(text);
    let labels = name.strip_prefix("*.").unwrap_or(name);
    let is_label = |label: &str| {
        let is_part = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        let edges = label.starts_with('-') || label.ends_with('-');
        !edges && (1..=LABEL_BYTES_MAX).contains(&label.len()) && label.bytes().all(is_part)
    };
    if name.len() > NAME_BYTES_MAX || !labels.split('.').all(is_label) {
        return Err("not a host name: use letters, digits and -, separated by dots".to_owned());
    }
    let last = labels.rsplit('.').next().unwrap_or_default();
    if last.bytes().all(|c| c.is_ascii_digit()) {
        return Err("neither an IP address nor a host name".to_owned());
    }
    Ok(name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ListenAddress, String> {
        text.parse()
    }

    #[test]
    fn listen_addresses_resolve() {
        for (text, resolved) in [
            ("127.0.0.1:7300", "127.0.0.1:7300"),
            ("[::1]:7300", "[::1]:7300"),
            ("0.0.0.0:0", "0.0.0.0:0"),
            ("localhost:7300", "127.0.0.1:7300"),
        ] {
            let address = read(text).unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(address.resolve().unwrap(), resolved.parse().unwrap());
        }
        let every = read(":7300").unwrap();
        assert_eq!(every.to_string(), ":7300");
        let resolved = every.resolve().unwrap();
        assert!(resolved.ip().is_unspecified() && resolved.port() == 7300);
    }

    #[test]
    fn a_name_resolves_to_its_first_ipv4_address() {
        let found = ["[::1]:1", "127.0.0.1:1", "127.0.0.2:1"];
        let found = found.map(|address| address.parse::<SocketAddr>().unwrap());
        assert_eq!(preferred(&found), Some(found[1]));
        assert_eq!(preferred(&found[..1]), Some(found[0]));
        assert_eq!(preferred(&[]), None);
    }

    #[test]
    fn address_errors_name_the_correct_form() {
        for (text, says) in [
            ("", ":PORT"),
            ("somewhere", "HOST:PORT"),
            ("7300", "127.0.0.1:7300"),
            ("127.0.0.1", "IP:PORT"),
            ("::1", "[::1]:7300"),
            ("::1:7300", "brackets"),
            ("tcp://localhost:7300", "a URL"),
            ("localhost:70000", "65535"),
            ("localhost:", "65535"),
            ("my host:7300", "not a host name"),
            ("10.0.0.300:7300", "neither an IP address"),
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.contains(says), "{text}: {refused}");
        }
    }

    #[test]
    fn certificate_hosts_are_parsed() {
        for (text, name) in [
            ("gate.example.com", "gate.example.com"),
            ("Gate.Example.COM.", "gate.example.com"),
            ("*.example.com", "*.example.com"),
            ("pump_7", "pump_7"),
            ("10.0.0.7", "10.0.0.7"),
            ("::1", "::1"),
        ] {
            assert_eq!(host_name(text), Ok(name.to_owned()));
        }
    }

    #[test]
    fn host_errors_name_the_correct_form() {
        let long = "a".repeat(64);
        for (text, says) in [
            ("", "empty"),
            (
                "https://gate.example.com/x",
                "only the host: gate.example.com",
            ),
            (
                "https://gate.example.com:7301",
                "only the host: gate.example.com",
            ),
            ("gate.example.com:7301", "path: gate.example.com"),
            ("gate.example.com/x", "path: gate.example.com"),
            ("[::1]", "omit the brackets: ::1"),
            ("[::1]:7301", "path: ::1"),
            ("0.0.0.0", "cannot connect"),
            ("::", "cannot connect"),
            ("10.0.0.300", "neither"),
            ("-a.b", "not a host name"),
            ("a..b", "not a host name"),
            ("a b", "not a host name"),
            ("*", "not a host name"),
            ("a.*.b", "not a host name"),
            ("straße.example", "xn--"),
            (&long, "not a host name"),
        ] {
            let refused = host_name(text).unwrap_err();
            assert!(refused.contains(says), "{text}: {refused}");
        }
    }
}
