//! A client that asks again and again and counts what it gets.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

/// Whom to ask, and how often.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// `HOST:PORT`, looked up for every connection.
    pub to: String,
    /// Requests a second, each on a connection of its own; 0 is as many as possible.
    pub rate: u32,
    /// Stops after so many requests; 0 goes on for ever.
    pub count: u64,
    /// Something to be found in every request and answer.
    pub marker: String,
    /// All requests on one connection; its end is the end.
    pub keep: bool,
}

const PATIENCE: Duration = Duration::from_secs(10);
/// The longest line of an answer's head.
const LONGEST_LINE: u64 = 4096;
const REPORT_EVERY: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Counts {
    ok: u64,
    failed: u64,
    last_error: Option<String>,
    slowest: Duration,
}

/// Asks, and writes one line of JSON every 250 ms: totals so far, the slowest request since the last line, the
/// last error. Returns whether there was no failure.
pub fn load(options: &LoadOptions) -> io::Result<bool> {
    let mut counts = Counts::default();
    let start = Instant::now();
    let mut reported = start;
    let pause = match options.rate {
        0 => Duration::ZERO,
        rate => Duration::from_secs(1) / rate,
    };
    let mut next = start;
    let mut kept = None;
    while options.count == 0 || counts.ok + counts.failed < options.count {
        let begun = Instant::now();
        let asked = if options.keep { ask_again(options, &mut kept) } else { ask(&options.to, &options.marker) };
        match asked {
            Ok(()) => counts.ok += 1,
            Err(error) => {
                counts.failed += 1;
                counts.last_error = Some(error.to_string());
                if options.keep {
                    break;
                }
            }
        }
        counts.slowest = counts.slowest.max(begun.elapsed());
        if reported.elapsed() >= REPORT_EVERY {
            report(&mut counts, start)?;
            reported = Instant::now();
        }
        next += pause;
        match next.checked_duration_since(Instant::now()) {
            Some(left) => thread::sleep(left),
            // Behind: no burst afterwards.
            None => next = Instant::now(),
        }
    }
    report(&mut counts, start)?;
    Ok(counts.failed == 0)
}

fn report(counts: &mut Counts, start: Instant) -> io::Result<()> {
    let line = json!({
        "seconds": start.elapsed().as_secs_f64(),
        "ok": counts.ok,
        "failed": counts.failed,
        "slowest_ms": counts.slowest.as_secs_f64() * 1e3,
        "last_error": counts.last_error,
    });
    counts.slowest = Duration::ZERO;
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn connect(to: &str) -> io::Result<TcpStream> {
    let address = to.to_socket_addrs()?.next().ok_or_else(|| io::Error::other("no address"))?;
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One more request on the connection that is kept.
fn ask_again(options: &LoadOptions, kept: &mut Option<BufReader<TcpStream>>) -> io::Result<()> {
    let reader = match kept {
        Some(reader) => reader,
        None => kept.insert(BufReader::new(connect(&options.to)?)),
    };
    let request = format!("GET /{} HTTP/1.1\r\nHost: {}\r\n\r\n", options.marker, options.to);
    reader.get_mut().write_all(request.as_bytes())?;
    let (mut line, mut length) = (String::new(), 0);
    while reader.take(LONGEST_LINE).read_line(&mut line)? > 0 && line.trim_end() != "" {
        if let Some(number) = line.strip_prefix("Content-Length: ") {
            length = number.trim_end().parse().map_err(io::Error::other)?;
        }
        line.clear();
    }
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    if length > 0 && body.len() as u64 == length && body.contains(&options.marker) {
        Ok(())
    } else {
        Err(io::Error::other("an answer that is cut off"))
    }
}

fn ask(to: &str, marker: &str) -> io::Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(format!("GET /{marker} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(64 * 1024).read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200") && answer.contains(marker) {
        Ok(())
    } else {
        Err(io::Error::other("an answer that is cut off"))
    }
}
