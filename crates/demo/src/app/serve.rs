//! A small web server: says who asks and from where, and how many have asked.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::rc::Rc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::pattern;

/// How the server is to listen.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// On which port, of all addresses of both families.
    pub port: u16,
}

/// The longest line of a request's head.
const LONGEST_LINE: u64 = 16 * 1024;
/// A client that says nothing for so long is gone.
const PATIENCE: Duration = Duration::from_secs(120);
/// Connections that the kernel keeps for us until they are accepted.
const BACKLOG: u32 = 4096;
/// The pause after an accept that failed for want of descriptors.
const BREATH: Duration = Duration::from_millis(20);

/// What was counted; not with it is who asks for the counts.
#[derive(Debug, Default)]
struct Counts {
    connections: std::cell::Cell<u64>,
    requests: std::cell::Cell<u64>,
}

/// Serves for ever: `/counts` says how many connections made requests, and how many; `/bulk/BYTES` gives (GET) or takes
/// (PUT) bytes that are checked; every other path is answered with itself.
pub fn serve(options: &ServeOptions) -> io::Result<()> {
    linux::privileges::raise_descriptor_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let socket = TcpSocket::new_v6()?;
        socket.set_reuseaddr(true)?;
        socket.bind((Ipv6Addr::UNSPECIFIED, options.port).into())?;
        let listener = socket.listen(BACKLOG)?;
        let counts = Rc::new(Counts::default());
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let counts = counts.clone();
                    // A client that breaks off is its own loss.
                    tokio::task::spawn_local(async move { drop(answer_all(stream, &counts).await) });
                }
                Err(_) => tokio::time::sleep(BREATH).await,
            }
        }
    })
}

async fn answer_all(stream: TcpStream, counts: &Counts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let client = match stream.peer_addr()?.ip().to_canonical() {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => v6.to_string(),
    };
    let mut stream = BufReader::new(stream);
    let mut counted = false;
    while let Some(request) = timeout(PATIENCE, Request::read(&mut stream)).await?? {
        if request.path == "/counts" {
            let body = json!({ "connections": counts.connections.get(), "requests": counts.requests.get() });
            send(&mut stream, &format!("{body}\n")).await?;
        } else {
            counts.requests.set(counts.requests.get() + 1);
            counts.connections.set(counts.connections.get() + u64::from(!counted));
            counted = true;
            match request.path.strip_prefix("/bulk/").and_then(|bytes| bytes.parse().ok()) {
                Some(bytes) if request.method == "PUT" => take(&mut stream, bytes).await?,
                Some(bytes) => give(&mut stream, bytes).await?,
                None => {
                    let path = request.path;
                    send(&mut stream, &format!("{path} for {client}, in clear as far as this program can tell\n"))
                        .await?;
                }
            }
        }
        if request.close {
            return stream.shutdown().await;
        }
    }
    Ok(())
}

struct Request {
    method: String,
    path: String,
    close: bool,
}

impl Request {
    /// The next request; `None` where there is none any more.
    async fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
        let mut first = String::new();
        if stream.take(LONGEST_LINE).read_line(&mut first).await? == 0 {
            return Ok(None);
        }
        let (mut line, mut close) = (String::new(), false);
        while stream.take(LONGEST_LINE).read_line(&mut line).await? > 0 && line.trim_end() != "" {
            close |= line.trim_end().eq_ignore_ascii_case("connection: close");
            line.clear();
        }
        let mut words = first.split_whitespace().map(str::to_owned);
        let method = words.next().unwrap_or_default();
        Ok(Some(Request { method, path: words.next().unwrap_or_else(|| "/".to_owned()), close }))
    }
}

async fn send(stream: &mut BufReader<TcpStream>, body: &str) -> io::Result<()> {
    stream.write_all([&head("text/plain", body.len() as u64), body].concat().as_bytes()).await
}

fn head(kind: &str, length: u64) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n")
}

async fn give(stream: &mut BufReader<TcpStream>, bytes: u64) -> io::Result<()> {
    stream.write_all(head("application/octet-stream", bytes).as_bytes()).await?;
    let (mut piece, mut sent) = (vec![0; pattern::PIECE], 0);
    while sent < bytes {
        let length = (bytes - sent).min(piece.len() as u64) as usize;
        pattern::fill(sent, &mut piece[..length]);
        stream.write_all(&piece[..length]).await?;
        sent += length as u64;
    }
    Ok(())
}

async fn take(stream: &mut BufReader<TcpStream>, bytes: u64) -> io::Result<()> {
    let (mut piece, mut taken, mut wrong) = (vec![0; pattern::PIECE], 0, None);
    while taken < bytes {
        let length = (bytes - taken).min(piece.len() as u64) as usize;
        timeout(PATIENCE, stream.read_exact(&mut piece[..length])).await??;
        wrong = wrong.or_else(|| pattern::first_difference(taken, &piece[..length]));
        taken += length as u64;
    }
    let verdict = wrong.map_or_else(|| format!("{taken} bytes, all right\n"), |at| format!("wrong at {at}\n"));
    send(stream, &verdict).await
}
