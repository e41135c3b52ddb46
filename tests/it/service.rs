//! Under a service manager: messages to a fake one, and sockets that it has opened.

use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::PATIENCE;
use crate::support::client::Link;
use crate::support::gateway::{Gateway, clean, command};
use crate::support::logs::collect;

/// A service manager that receives messages.
struct Manager {
    socket: UnixDatagram,
    dir: TempDir,
}

impl Manager {
    fn new() -> Manager {
        let dir = TempDir::new().expect("a directory");
        let socket = UnixDatagram::bind(dir.path().join("notify")).expect("binds");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Manager { socket, dir }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("notify")
    }

    /// Waits for a message that has a line `line`, and returns the message.
    fn wait_for(&self, line: &str) -> String {
        loop {
            let mut buffer = [0; 1024];
            let length = self.socket.recv(&mut buffer).expect(line);
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if message.lines().any(|found| found == line) {
                return message;
            }
        }
    }
}

fn watched(manager: &Manager, watchdog: Duration) -> Command {
    let mut serve = command(&["serve"]);
    serve.env("NOTIFY_SOCKET", manager.path());
    serve.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
    serve
}

#[test]
fn the_manager_hears_of_start_life_and_end() {
    let manager = Manager::new();
    let watchdog = Duration::from_secs(1);
    let dir = TempDir::new().expect("a directory");
    let mut gateway = Gateway::start_by(watched(&manager, watchdog), dir.path(), &[]);
    let ready = manager.wait_for("READY=1");
    assert!(ready.contains("STATUS=serving"), "{ready}");
    let (mut link, _) = gateway.connect("pump");
    link.ping();
    manager.wait_for("STATUS=devices connected: 1, readings stored: 0");
    let began = Instant::now();
    for _ in 0..4 {
        manager.wait_for("WATCHDOG=1");
    }
    // Half the interval each, the first of which has begun; a busy machine takes longer.
    let took = began.elapsed();
    assert!(took > watchdog * 5 / 4 && took < watchdog * 4, "{took:?}");
    gateway.terminate();
    let stopping = manager.wait_for("STOPPING=1");
    assert!(stopping.contains("STATUS=draining"), "{stopping}");
    assert!(gateway.wait().status.success());
}

#[test]
fn ready_follows_the_listeners() {
    let manager = Manager::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let dir = TempDir::new().expect("a directory");
    let mut serve = watched(&manager, Duration::from_secs(60));
    serve.arg("--data-dir").arg(dir.path());
    serve.args(["--listen", &taken.local_addr().expect("bound").to_string()]);
    serve.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(!serve.status().expect("starts").success());
    manager.socket.set_nonblocking(true).expect("a socket");
    let heard = manager.socket.recv(&mut [0; 1024]);
    assert!(heard.is_err(), "a message of a gateway that cannot listen");
}

/// Returns a command that starts the gateway with `sockets` as descriptors 3 and up, as systemd does.
fn activated(sockets: &[&TcpListener]) -> Command {
    // Standard input and output are the only descriptors that std passes on; the shell moves them to their places.
    assert!(sockets.len() == 1, "one fits");
    let mut shell = clean("sh");
    let binary = env!("CARGO_BIN_EXE_fieldgate");
    let script = format!(
        "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS={}; exec {binary} serve \"$@\"",
        sockets.len()
    );
    shell.args(["-c", &script, "sh"]);
    let socket = sockets[0].try_clone().expect("clones");
    shell.stdin(Stdio::from(std::os::fd::OwnedFd::from(socket)));
    shell
}

fn start_activated(socket: &TcpListener, dir: &Path, flags: &[&str]) -> Gateway {
    Gateway::start_by(activated(&[socket]), dir, flags)
}

#[test]
fn a_socket_of_the_manager_is_used_and_keeps_its_peers() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let listen = socket.local_addr().expect("bound").to_string();
    let dir = TempDir::new().expect("a directory");
    for _ in 0..2 {
        let mut gateway = start_activated(&socket, dir.path(), &["--listen", &listen]);
        assert_eq!(gateway.addr.to_string(), listen);
        gateway.connect("pump").0.ping();
        gateway.terminate();
        assert!(gateway.wait().status.success());
        // The socket is still open, so that a peer waits for the next gateway.
        drop(std::net::TcpStream::connect(&listen).expect("connects"));
    }
    let gateway = start_activated(&socket, dir.path(), &["--http", &listen]);
    assert_eq!(gateway.http_addr().to_string(), listen);
    Link::login(gateway.addr, &gateway.device("pump")).0.ping();
}

#[test]
fn a_socket_without_a_listener_is_refused() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let dir = TempDir::new().expect("a directory");
    let mut serve = activated(&[&socket]);
    serve
        .arg("--data-dir")
        .arg(dir.path())
        .args(["--listen", "127.0.0.1:0"]);
    let mut process = serve
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let stderr = collect(process.stderr.take().expect("piped")).read_to_end();
    // It may serve on.
    let _ = process.kill();
    let status = process.wait().expect("a child");
    let stderr = stderr.expect("does not end");
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no listener has this address"), "{stderr}");
}
