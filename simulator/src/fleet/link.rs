//! A device's connection: bytes in, bytes out, and no memory while it is idle.

use std::io;

use bytes::BytesMut;
use fieldgate_protocol::message;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// A connection's socket and what is on its way in and out.
pub(super) struct Link {
    pub(super) socket: TcpStream,
    pub(super) input: BytesMut,
    pub(super) output: BytesMut,
}

impl Link {
    pub(super) fn new(socket: TcpStream) -> Link {
        Link {
            socket,
            input: BytesMut::new(),
            output: BytesMut::new(),
        }
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        if !self.output.is_empty() {
            self.socket.write_all(&self.output).await?;
            self.output.clear();
        }
        Ok(())
    }

    /// Reads what is there; tells whether the connection still stands.
    pub(super) fn read(&mut self) -> bool {
        self.input.reserve(1024);
        match self.socket.try_read_buf(&mut self.input) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Gives memory back before a wait: a fleet is large, and most of it is idle.
    pub(super) fn rest(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        self.output = BytesMut::new();
    }

    /// Says goodbye.
    pub(super) async fn leave(&mut self) {
        let bye = message::Bye {
            code: 0,
            retry_after_ms: 0,
            min_version: 0,
            max_version: 0,
            detail: "done",
            ext: &[],
        };
        let mut frame = [0; 64];
        if let Ok(frame_bytes) = message::encode(&bye, 0, &mut frame) {
            // The gateway may be gone by now, and all is acked.
            let _ = self.socket.write_all(&frame[..frame_bytes]).await;
        }
        let _ = self.socket.shutdown().await;
    }
}
