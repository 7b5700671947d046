//! What a load does on a connection, and how that can fail.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::super::pattern;
use super::within;

/// The longest line of an answer's head.
const LONGEST_LINE: u64 = 4096;
/// The longest answer that is no bulk.
const LONGEST_ANSWER: u64 = 64 * 1024;

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) to: String,
    pub(super) marker: String,
    pub(super) patience: Duration,
}

/// How a connection failed its user.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    /// While it did what: `connect`, `send`, `receive` or `close`.
    pub(super) stage: &'static str,
    pub(super) kind: Kind,
    pub(super) text: String,
}

/// What the user sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nobody took the connection.
    Refused,
    /// It was reset.
    Reset,
    /// It ended cleanly before it should: the one that a program may take for success.
    EarlyEnd,
    /// Something else came than was sent.
    WrongBytes,
    /// Nothing happened for too long.
    Timeout,
    /// Anything else.
    Other,
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::EarlyEnd => "early-end",
            Self::WrongBytes => "wrong-bytes",
            Self::Timeout => "timeout",
            Self::Other => "other",
        }
    }
}

impl Broken {
    pub(super) fn by(stage: &'static str, error: &io::Error) -> Self {
        use io::ErrorKind as Error;
        let kind = match error.kind() {
            Error::ConnectionRefused => Kind::Refused,
            Error::ConnectionReset | Error::BrokenPipe | Error::ConnectionAborted | Error::NotConnected => Kind::Reset,
            Error::UnexpectedEof => Kind::EarlyEnd,
            Error::TimedOut => Kind::Timeout,
            Error::InvalidData => Kind::WrongBytes,
            _ => Kind::Other,
        };
        Self { stage, kind, text: error.to_string() }
    }

    fn wrong(text: String) -> Self {
        Self { stage: "receive", kind: Kind::WrongBytes, text }
    }
}

impl Client {
    /// One connection with one request; the number of bytes of its answer.
    pub(super) async fn ask(&self, word: &str) -> Result<u64, Broken> {
        let mut connection = self.open().await?;
        let answered = self.exchange(&mut connection, word, "Connection: close\r\n").await?;
        end(&mut connection, self.patience).await?;
        Ok(answered)
    }

    /// A connection that is to stay.
    pub(super) async fn open(&self) -> Result<BufReader<TcpStream>, Broken> {
        let connected = within(self.patience, "connect", async {
            let address = match self.to.parse::<SocketAddr>() {
                Ok(address) => address,
                Err(_) => {
                    let found = tokio::net::lookup_host(&self.to).await?.next();
                    found.ok_or_else(|| io::Error::other("the name has no address"))?
                }
            };
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        Ok(BufReader::new(connected.await?))
    }

    /// One more request on it.
    pub(super) async fn ask_on(&self, connection: &mut BufReader<TcpStream>, word: &str) -> Result<u64, Broken> {
        self.exchange(connection, word, "").await
    }

    async fn exchange(&self, connection: &mut BufReader<TcpStream>, word: &str, headers: &str) -> Result<u64, Broken> {
        let path = format!("/{}/{word}", self.marker);
        let length = self.request(connection, &format!("GET {path}"), headers).await?;
        if length > LONGEST_ANSWER {
            return Err(Broken::wrong(format!("an answer of {length} bytes to {path}")));
        }
        let mut body = vec![0; length as usize];
        within(self.patience, "receive", connection.read_exact(&mut body)).await?;
        if !body.starts_with(format!("{path} for ").as_bytes()) {
            return Err(Broken::wrong(format!("{path} was answered with {:?}", String::from_utf8_lossy(&body))));
        }
        Ok(length)
    }

    /// Sends a request's head, and gives the length of the answer's body.
    async fn request(
        &self,
        connection: &mut BufReader<TcpStream>,
        request: &str,
        headers: &str,
    ) -> Result<u64, Broken> {
        self.send_head(connection, request, headers).await?;
        self.receive_head(connection).await
    }

    async fn send_head(
        &self,
        connection: &mut BufReader<TcpStream>,
        request: &str,
        headers: &str,
    ) -> Result<(), Broken> {
        let head = format!("{request} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", self.to);
        within(self.patience, "send", connection.write_all(head.as_bytes())).await
    }

    async fn receive_head(&self, connection: &mut BufReader<TcpStream>) -> Result<u64, Broken> {
        within(self.patience, "receive", async {
            let (mut line, mut first, mut length) = (String::new(), true, None);
            loop {
                line.clear();
                if connection.take(LONGEST_LINE).read_line(&mut line).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let text = line.trim_end();
                if first && !text.starts_with("HTTP/1.1 200 ") {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an answer that begins {text:?}")));
                }
                first = false;
                if text.is_empty() {
                    let missing = || io::Error::new(io::ErrorKind::InvalidData, "an answer without a length");
                    return length.ok_or_else(missing);
                }
                length = length.or_else(|| text.strip_prefix("Content-Length: ")?.parse().ok());
            }
        })
        .await
    }

    /// Reads bulk on a connection of its own.
    pub(super) async fn fetch(&self, bytes: u64) -> Result<u64, Broken> {
        let mut connection = self.open().await?;
        let length = self.request(&mut connection, &format!("GET /bulk/{bytes}"), "Connection: close\r\n").await?;
        if length != bytes {
            return Err(Broken::wrong(format!("{length} bytes instead of {bytes}")));
        }
        let (mut piece, mut taken) = (vec![0; pattern::PIECE], 0);
        while taken < bytes {
            let length = (bytes - taken).min(piece.len() as u64) as usize;
            within(self.patience, "receive", connection.read_exact(&mut piece[..length])).await?;
            if let Some(at) = pattern::first_difference(taken, &piece[..length]) {
                return Err(Broken::wrong(format!("byte {at} is not what was sent")));
            }
            taken += length as u64;
        }
        end(&mut connection, self.patience).await?;
        Ok(taken)
    }

    /// Sends bulk on a connection of its own; the other end checks it.
    pub(super) async fn send(&self, bytes: u64) -> Result<u64, Broken> {
        let mut connection = self.open().await?;
        let headers = format!("Content-Length: {bytes}\r\nConnection: close\r\n");
        self.send_head(&mut connection, &format!("PUT /bulk/{bytes}"), &headers).await?;
        let (mut piece, mut sent) = (vec![0; pattern::PIECE], 0);
        while sent < bytes {
            let length = (bytes - sent).min(piece.len() as u64) as usize;
            pattern::fill(sent, &mut piece[..length]);
            within(self.patience, "send", connection.write_all(&piece[..length])).await?;
            sent += length as u64;
        }
        let length = self.receive_head(&mut connection).await?.min(LONGEST_ANSWER);
        let mut verdict = vec![0; length as usize];
        within(self.patience, "receive", connection.read_exact(&mut verdict)).await?;
        if verdict != format!("{bytes} bytes, all right\n").as_bytes() {
            return Err(Broken::wrong(String::from_utf8_lossy(&verdict).into_owned()));
        }
        end(&mut connection, self.patience).await?;
        Ok(sent)
    }
}

/// Ends a connection in order: our end is said first, and answered by the other.
pub(super) async fn close(mut connection: BufReader<TcpStream>, patience: Duration) -> Result<(), Broken> {
    within(patience, "close", connection.shutdown()).await?;
    end(&mut connection, patience).await
}

/// The other side's end, with nothing before it.
async fn end(connection: &mut BufReader<TcpStream>, patience: Duration) -> Result<(), Broken> {
    match within(patience, "close", connection.read(&mut [0])).await? {
        0 => Ok(()),
        _ => Err(Broken::wrong("more bytes than were asked for".to_owned())),
    }
}
