//! `justmtls admin`: a page of a process' admin socket on standard output, for `kubectl exec` into an image that has no other
//! program.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The Unix socket.
    socket: PathBuf,
    /// The page, such as /readyz.
    page: String,
}

/// How long a process may take for a page.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest answer, in bytes.
const LARGEST: u64 = 64 << 20;

/// Prints the page; the exit status is 1 where the process says no, as `/readyz` may.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let (good, body) = fetch(&arguments.socket, &arguments.page)?;
    std::io::stdout().write_all(&body)?;
    Ok(i32::from(!good))
}

/// Whether the answer is a success, and its body. HTTP/1.0: the answer ends with the connection.
fn fetch(socket: &Path, page: &str) -> anyhow::Result<(bool, Vec<u8>)> {
    if !page.starts_with('/') || page.contains(|c: char| c.is_whitespace() || c.is_control()) {
        bail!("{page:?} is not a page: it begins with a slash and has no blanks, as /readyz");
    }
    let place = || format!("{}: the process does not answer", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(place)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {page} HTTP/1.0\r\nhost: admin\r\n\r\n").with_context(place)?;
    let mut answer = Vec::new();
    stream.take(LARGEST).read_to_end(&mut answer).with_context(place)?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let Some(end) = end else { bail!("{}: what answers there is no admin socket", socket.display()) };
    let body = answer.split_off(end + 4);
    let status = answer.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    Ok((status.starts_with(b"2"), body))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn answered(answer: &'static str) -> anyhow::Result<(bool, Vec<u8>)> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("admin.sock");
        let listener = UnixListener::bind(&socket)?;
        let serving = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 256];
            let length = stream.read(&mut asked).unwrap();
            assert!(asked[..length].starts_with(b"GET /readyz HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let answer = fetch(&socket, "/readyz");
        serving.join().unwrap();
        answer
    }

    #[test]
    fn the_page_is_printed_whether_or_not_the_process_is_ready() {
        let ready = answered("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
        assert_eq!(ready, (true, b"{}".to_vec()));
        let not_yet = answered("HTTP/1.0 503 Service Unavailable\r\n\r\n{\"ready\":false}").unwrap();
        assert_eq!(not_yet, (false, b"{\"ready\":false}".to_vec()));
    }

    #[test]
    fn what_is_no_page_or_no_process_is_named() {
        let why = |page: &str| fetch(Path::new("/nowhere/admin.sock"), page).unwrap_err().to_string();
        assert!(why("readyz").contains("begins with a slash"));
        assert!(why("/a b").contains("has no blanks"));
        assert!(why("/readyz").contains("/nowhere/admin.sock: the process does not answer"));
        assert!(answered("nonsense").unwrap_err().to_string().contains("no admin socket"));
    }
}
