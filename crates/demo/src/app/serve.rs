//! A small web server: says who asks and from where.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// How the server is to listen.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// On which port, of all addresses of both families.
    pub port: u16,
}

/// The longest request head that is read.
const LONGEST_HEAD: u64 = 16 * 1024;
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves for ever.
pub fn serve(options: &ServeOptions) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, options.port))?;
    loop {
        let (stream, _) = listener.accept()?;
        thread::Builder::new().spawn(move || {
            // A client that breaks off is its own loss.
            let _ = answer_all(stream);
        })?;
    }
}

fn answer_all(mut stream: TcpStream) -> io::Result<()> {
    use std::io::Read;
    stream.set_read_timeout(Some(PATIENCE))?;
    let peer = stream.peer_addr()?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut first = String::new();
        if reader.by_ref().take(LONGEST_HEAD).read_line(&mut first)? == 0 {
            return Ok(());
        }
        let mut close = false;
        let mut line = String::new();
        while reader.by_ref().take(LONGEST_HEAD).read_line(&mut line)? > 0 && line.trim_end() != "" {
            close |= line.trim_end().eq_ignore_ascii_case("connection: close");
            line.clear();
        }
        let path = first.split_whitespace().nth(1).unwrap_or("/").to_owned();
        let client = match peer.ip().to_canonical() {
            std::net::IpAddr::V4(v4) => v4.to_string(),
            std::net::IpAddr::V6(v6) => v6.to_string(),
        };
        let body = format!("{path} for {client}, in clear as far as this program can tell\n");
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all([head, body].concat().as_bytes())?;
        if close {
            return Ok(());
        }
    }
}
