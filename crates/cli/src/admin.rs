//! `justmtls admin SOCKET PAGE`: a page of a process of the product, as `kubectl exec` can print it where there is no other
//! program in the image.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

/// How long the process may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest page, in bytes: the dump of a large mesh.
const LARGEST: u64 = 256 * 1024 * 1024;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The Unix socket, as the process was given it by --admin.
    socket: PathBuf,
    /// The page, as /pods.
    page: String,
}

/// Prints the page. A page that says that something is not well is printed, too, and the status is 1.
pub(crate) fn run(arguments: &Arguments) -> Result<i32> {
    let page = &arguments.page;
    ensure!(
        page.starts_with('/') && page.chars().all(|it| it.is_ascii_graphic()),
        "{page:?} is no page; write it as /pods"
    );
    let socket = arguments.socket.display();
    let mut stream = UnixStream::connect(&arguments.socket).with_context(|| format!("nobody listens at {socket}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream
        .write_all(format!("GET {page} HTTP/1.0\r\n\r\n").as_bytes())
        .with_context(|| format!("cannot ask at {socket}"))?;
    let mut answer = Vec::new();
    stream.take(LARGEST).read_to_end(&mut answer).with_context(|| format!("no answer at {socket}"))?;
    let (status, body) = split(&answer).with_context(|| format!("the answer at {socket} is not understood"))?;
    std::io::stdout().write_all(body)?;
    match status {
        200 => Ok(0),
        503 => Ok(1),
        other => bail!("{page} at {socket}: status {other}"),
    }
}

/// The status and the body of an answer of HTTP/1.0, which ends with the connection.
fn split(answer: &[u8]) -> Option<(u16, &[u8])> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, &answer[end + 4..]))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn an_answer_is_split_where_its_head_ends() {
        let answer = b"HTTP/1.0 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno";
        assert_eq!(split(answer), Some((503, b"no".as_slice())));
        assert_eq!(split(b"HTTP/1.0 200 OK\r\n"), None);
    }

    #[test]
    fn the_status_tells_what_the_page_says() {
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("admin.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let serving = std::thread::spawn(move || {
            for status in ["200 OK", "503 Service Unavailable", "404 Not Found"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = *b"GET /readyz HTTP/1.0\r\n\r\n";
                asked.fill(0);
                stream.read_exact(&mut asked).unwrap();
                assert_eq!(&asked, b"GET /readyz HTTP/1.0\r\n\r\n");
                write!(stream, "HTTP/1.0 {status}\r\n\r\n{{}}").unwrap();
            }
        });
        let arguments = Arguments { socket, page: "/readyz".into() };
        assert_eq!(run(&arguments).unwrap(), 0);
        assert_eq!(run(&arguments).unwrap(), 1);
        assert!(run(&arguments).unwrap_err().to_string().contains("status 404"));
        serving.join().unwrap();
        let wrong = Arguments { page: "readyz".into(), ..arguments };
        assert!(run(&wrong).unwrap_err().to_string().contains("write it as /pods"));
    }
}
