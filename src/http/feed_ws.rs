//! `/v1/feed/ws`: the feed over a WebSocket, one text message for each event.
//!
//! axum's own WebSocket needs second versions of several crates, so this uses `tokio-websockets` after hyper's upgrade.

use axum::Extension;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use ring::digest;
use tokio::sync::mpsc::Receiver;
use tokio_websockets::{CloseCode, Error, Limits, Message as Frame, ServerBuilder};

use super::feed::{Message, Wanted};
use super::problem::{Parameters, Problem};
use super::{Client, Shared};

/// Maximum size of a message from the client, which the feed ignores.
const MESSAGE_BYTES_MAX: usize = 1024;
/// Number of random bytes in a key.
const KEY_BYTES: usize = 16;
/// Text that RFC 6455 appends to a key.
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The only version of the protocol.
const VERSION: &str = "13";

/// Sends the events after the cursor `after`; without a cursor, the events from now on.
pub(super) async fn feed_ws(
    State(site): State<Shared>,
    Extension(client): Extension<Client>,
    Parameters(wanted): Parameters<Wanted>,
    mut request: Request,
) -> Result<Response, Problem> {
    let (after, filter) = wanted.checked()?;
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (Some(upgrade), Some(accept)) = (upgrade, accept(request.headers())) else {
        return Ok(not_a_websocket());
    };
    let messages = site.feed.subscribe(after, filter, client.clone()).await?;
    tokio::spawn(async move {
        tokio::select! {
            sent = send_all(upgrade, messages) => if let Err(error) = sent {
                tracing::debug!(%error, "WebSocket failed");
            },
            () = client.closed() => {}
        }
    });
    let headers = [
        (CONNECTION, "upgrade".to_owned()),
        (UPGRADE, "websocket".to_owned()),
        (SEC_WEBSOCKET_ACCEPT, accept),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}

fn not_a_websocket() -> Response {
    let problem = Problem::new(
        StatusCode::UPGRADE_REQUIRED,
        "the request does not open a WebSocket of version 13",
        "connect with a WebSocket client, or use /v1/feed",
    );
    let headers = [(UPGRADE, "websocket"), (SEC_WEBSOCKET_VERSION, VERSION)];
    (headers, problem).into_response()
}

/// Returns the answer to the key of a request that opens a WebSocket; `None` if it does not.
fn accept(headers: &HeaderMap) -> Option<String> {
    let has = |name: HeaderName, wanted: &str| {
        let values = headers.get_all(name).into_iter();
        let mut words = values.flat_map(|value| value.to_str().unwrap_or_default().split(','));
        words.any(|word| word.trim().eq_ignore_ascii_case(wanted))
    };
    let is_websocket = has(CONNECTION, "upgrade")
        && has(UPGRADE, "websocket")
        && has(SEC_WEBSOCKET_VERSION, VERSION);
    let key = headers.get(SEC_WEBSOCKET_KEY).filter(|_| is_websocket)?;
    let random = BASE64_STANDARD.decode(key).ok()?;
    if random.len() != KEY_BYTES {
        return None;
    }
    let mut digest = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    digest.update(key.as_bytes());
    digest.update(KEY_SUFFIX.as_bytes());
    Some(BASE64_STANDARD.encode(digest.finish()))
}

/// Sends messages and answers pings until one side closes. Reads only if all written data is sent, so that pongs for a
/// client that does not read cost no memory.
async fn send_all(upgrade: OnUpgrade, mut messages: Receiver<Message>) -> Result<(), Error> {
    let upgraded = upgrade.await.map_err(std::io::Error::other)?;
    let limits = Limits::default().max_payload_len(Some(MESSAGE_BYTES_MAX));
    let builder = ServerBuilder::new().limits(limits);
    let mut socket = builder.serve(TokioIo::new(upgraded));
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Some(Message::Reset) => {
                    socket.send(frame(Message::Reset)).await?;
                    let code = Some(CloseCode::NORMAL_CLOSURE);
                    socket.send(Frame::close(code, "reset")).await?;
                    return socket.close().await;
                }
                Some(message) => socket.send(frame(message)).await?,
                None => return socket.close().await,
            },
            received = socket.next() => match received {
                Some(Ok(received)) if received.is_close() => return socket.close().await,
                // A ping has queued a pong.
                Some(Ok(_)) => socket.flush().await?,
                Some(Err(error)) => {
                    // The close frame states the reason.
                    drop(socket.flush().await);
                    return Err(error);
                }
                None => return Ok(()),
            },
        }
    }
}

fn frame(message: Message) -> Frame {
    Frame::text(match message {
        Message::Event { json, .. } => json.to_string(),
        Message::Cursor(cursor) => format!("{{\"cursor\":{cursor}}}"),
        Message::Reset => "{\"reset\":true}".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_the_standard_is_accepted() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (CONNECTION, "keep-alive, Upgrade"),
            (UPGRADE, "WebSocket"),
            (SEC_WEBSOCKET_VERSION, "13"),
            (SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let answer = accept(&headers);
        assert_eq!(answer.as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        for (name, value) in [
            (SEC_WEBSOCKET_KEY, "c2hvcnQ="),
            (SEC_WEBSOCKET_VERSION, "8"),
            (UPGRADE, "h2c"),
        ] {
            let mut changed = headers.clone();
            changed.insert(name, value.parse().unwrap());
            assert_eq!(accept(&changed), None, "{value}");
        }
    }
}
