//! Requests to a running gateway's HTTP listener.

use std::path::PathBuf;

use axum::body::{Body, to_bytes};
use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::{Request, Response, StatusCode, Uri};
use clap::Args;
use hyper_util::rt::TokioIo;
use serde_json::Value as Json;
use tokio::net::TcpStream;

use super::Error;
use crate::http::Tokens;
use crate::sys::secret_file::SecretReaders;

/// Maximum size of a message of refusal.
const REFUSAL_BYTES_MAX: usize = 4096;

#[derive(Args, Clone, Debug)]
pub struct GatewayArgs {
    /// Address of the gateway's HTTP listener
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7380")]
    pub url: Uri,

    /// File whose first line `read TOKEN` has the token, such as the gateway's --http-token-file
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The HTTP listener of a gateway.
#[derive(Debug)]
pub struct GatewayHttp {
    pub url: Uri,
    authority: String,
    host: String,
    port: u16,
    token: Option<String>,
}

/// Why there is no answer to use.
pub enum Refused {
    /// Another request may succeed.
    Lost(String),
    Failed(Error),
}

fn lost(error: impl ToString) -> Refused {
    Refused::Lost(error.to_string())
}

impl GatewayHttp {
    /// Reads the token; makes no request.
    pub fn new(args: &GatewayArgs, readers: SecretReaders) -> Result<GatewayHttp, Error> {
        let url = &args.url;
        let (Some("http"), Some(authority)) = (url.scheme_str(), url.authority()) else {
            let error = format!("invalid URL {url}; write http://HOST:PORT");
            return Err(Error::Usage(error));
        };
        let token = match &args.token_file {
            Some(path) => {
                let tokens = Tokens::load(path, readers);
                let tokens = tokens.map_err(|error| Error::Failed(error.to_string()))?;
                tokens.first().map(str::to_owned)
            }
            None => None,
        };
        Ok(GatewayHttp {
            url: url.clone(),
            authority: authority.as_str().to_owned(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            token,
        })
    }

    /// Requests a path over a new connection; returns the answer whatever its status.
    async fn request(&self, path: &str) -> Result<Response<Body>, Refused> {
        let socket = TcpStream::connect((self.host.as_str(), self.port));
        let socket = TokioIo::new(socket.await.map_err(lost)?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(socket)
            .await
            .map_err(lost)?;
        // It ends with the answer.
        tokio::spawn(connection);
        let mut request = Request::get(path).header(HOST, &self.authority);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Body::empty()).map_err(lost)?;
        let answer = sender.send_request(request).await.map_err(lost)?;
        Ok(answer.map(Body::new))
    }

    /// Requests a path; returns the body of a successful answer.
    pub async fn get(&self, path: &str) -> Result<Body, Refused> {
        let answer = self.request(path).await?;
        let status = answer.status();
        if status == StatusCode::OK {
            return Ok(answer.into_body());
        }
        let text = to_bytes(answer.into_body(), REFUSAL_BYTES_MAX).await;
        let text = text.map_err(lost)?;
        let reason = match serde_json::from_slice::<Json>(&text) {
            Ok(problem) => {
                let words = ["error", "fix"].map(|key| problem[key].as_str().unwrap_or_default());
                words.join("; ")
            }
            // Not a gateway.
            Err(_) => status.to_string(),
        };
        match status.is_server_error() {
            true => Err(Refused::Lost(reason)),
            false => Err(Refused::Failed(Error::Failed(format!(
                "the gateway refused the request: {reason}"
            )))),
        }
    }

    /// Requests a path; returns the text of the answer, whatever its status, up to `bytes_max`.
    pub async fn text(
        &self,
        path: &str,
        bytes_max: usize,
    ) -> Result<(StatusCode, String), Refused> {
        let answer = self.request(path).await?;
        let status = answer.status();
        let text = to_bytes(answer.into_body(), bytes_max).await;
        let text = text.map_err(lost)?;
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }
}
