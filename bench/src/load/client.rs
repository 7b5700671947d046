//! The client: does what it is told, with blocking sockets, and tells how it went.

use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::{Answer, ECHO, Order, SINK, Work, at};

/// The most that happens at once.
const WORKERS: usize = 64;
/// How long a single step may take before the work has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a bulk stream writes at once.
const PIECE: usize = 128 * 1024;
/// Round trips and connections that go before, unmeasured.
const WARM_UP: usize = 50;

/// Obeys until standard input ends. Says `ready` first.
pub(crate) fn run() -> Result<()> {
    linux::privileges::raise_descriptor_limit().context("cannot raise the limit of open descriptors")?;
    let workers = Workers::start(WORKERS)?;
    let mut prepared = None;
    let mut output = io::stdout();
    writeln!(output, "ready")?;
    output.flush()?;
    for line in io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Order::Prepare { work, to, milliseconds } => {
                // What was kept ends first.
                prepared = None;
                let made = Prepared::new(work, to, Duration::from_millis(milliseconds), &workers);
                made.map(|made| prepared = Some(made)).map(|()| Answer::default())
            }
            Order::Go => match &mut prepared {
                Some(prepared) => prepared.go(&workers),
                None => Err(anyhow!("nothing was prepared")),
            },
        };
        let answer = answer.unwrap_or_else(|error| Answer { error: Some(format!("{error:#}")), ..Answer::default() });
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
    }
    Ok(())
}

/// Work, and the connections that it needs.
struct Prepared {
    work: Work,
    to: SocketAddr,
    time: Duration,
    /// Each with its verb said and echoed.
    connections: Vec<TcpStream>,
}

impl Prepared {
    fn new(work: Work, to: SocketAddr, time: Duration, workers: &Workers) -> Result<Prepared> {
        let sinks = |count: usize| (0..count).map(|_| open(to, SINK)).collect::<io::Result<Vec<_>>>();
        let connections = match work {
            Work::Bulk { streams } => sinks(streams)?,
            Work::Ping { size, beside } => {
                let mut all = sinks(beside)?;
                let mut one = open(to, ECHO)?;
                round_trips(&mut one, size, |done, _| done < WARM_UP)?;
                all.push(one);
                all
            }
            Work::Connect { at_once } => {
                let warm_up = move |_| (0..WARM_UP.div_ceil(at_once)).try_for_each(|_| connect_once(to));
                workers.run(at_once, warm_up)?.into_iter().collect::<io::Result<()>>()?;
                Vec::new()
            }
            Work::ConnectCold { .. } => Vec::new(),
            Work::Hold { connections } => {
                let open_some = move |worker: usize| {
                    (worker..connections).step_by(WORKERS).map(|_| open(to, ECHO)).collect::<io::Result<Vec<_>>>()
                };
                let all = workers.run(WORKERS, open_some)?.into_iter().collect::<io::Result<Vec<_>>>()?;
                all.into_iter().flatten().collect()
            }
        };
        Ok(Prepared { work, to, time, connections })
    }

    fn go(&mut self, workers: &Workers) -> Result<Answer> {
        let start = Instant::now();
        let (to, until) = (self.to, start + self.time);
        let mut answer = match self.work {
            Work::Bulk { .. } => {
                let bytes = in_bulk(std::mem::take(&mut self.connections), until, workers)?.finish()?;
                Answer { bytes, ..Answer::default() }
            }
            Work::Ping { size, .. } => {
                let mut one = self.connections.pop().context("a slice goes once")?;
                let bulk = in_bulk(std::mem::take(&mut self.connections), until, workers)?;
                let times = round_trips(&mut one, size, |_, now| now < until)?;
                Answer { bytes: bulk.finish()?, ..of_times(times) }
            }
            Work::Connect { at_once } => {
                let all = workers.run(at_once, move |_| timed(|| Instant::now() < until, || connect_once(to)))?;
                of_times(all.into_iter().collect::<io::Result<Vec<_>>>()?.concat())
            }
            Work::ConnectCold { ports } => {
                let mut next = (to.port()..).take(usize::from(ports));
                let mut times = Vec::new();
                next.try_for_each(|port| {
                    let start = Instant::now();
                    connect_once(at(to.ip(), port))?;
                    times.push(start.elapsed());
                    io::Result::Ok(())
                })?;
                of_times(times)
            }
            Work::Hold { .. } => Answer { count: self.connections.len() as u64, ..Answer::default() },
        };
        answer.seconds = start.elapsed().as_secs_f64();
        Ok(answer)
    }
}

fn of_times(mut times: Vec<Duration>) -> Answer {
    times.sort_unstable();
    let at = |share: usize| times.get(times.len() * share / 100).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    Answer { count: times.len() as u64, p50_us: at(50), p99_us: at(99), ..Answer::default() }
}

fn timed(go_on: impl Fn() -> bool, mut step: impl FnMut() -> io::Result<()>) -> io::Result<Vec<Duration>> {
    let mut times = Vec::new();
    while go_on() {
        let start = Instant::now();
        step()?;
        times.push(start.elapsed());
    }
    Ok(times)
}

fn round_trips(
    stream: &mut TcpStream,
    size: usize,
    go_on: impl Fn(usize, Instant) -> bool,
) -> io::Result<Vec<Duration>> {
    let (out, mut back) = (vec![0x5a; size], vec![0; size]);
    let mut times = Vec::new();
    let mut before = Instant::now();
    while go_on(times.len(), before) {
        stream.write_all(&out)?;
        stream.read_exact(&mut back)?;
        let now = Instant::now();
        times.push(now - before);
        before = now;
    }
    Ok(times)
}

fn connect_once(to: SocketAddr) -> io::Result<()> {
    open(to, ECHO).map(drop)
}

fn open(to: SocketAddr, verb: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut back = [0];
    stream.write_all(&[verb])?;
    stream.read_exact(&mut back)?;
    if back == [verb] { Ok(stream) } else { Err(io::Error::other("something else answers")) }
}

/// Streams that send until their time is over.
struct InBulk(Vec<mpsc::Receiver<io::Result<(u64, u64)>>>);

fn in_bulk(streams: Vec<TcpStream>, until: Instant, workers: &Workers) -> Result<InBulk> {
    let start = |(number, stream): (usize, TcpStream)| workers.start_one(number, move || send_until(stream, until));
    streams.into_iter().enumerate().map(start).collect::<Result<_>>().map(InBulk)
}

impl InBulk {
    /// The bytes of all of them, once the server has confirmed each.
    fn finish(self) -> Result<u64> {
        self.0.into_iter().try_fold(0, |total, one| {
            let (sent, confirmed) = one.recv().context("a worker has ended")??;
            ensure!(sent == confirmed, "{sent} bytes were sent and {confirmed} arrived");
            Ok(total + confirmed)
        })
    }
}

fn send_until(mut stream: TcpStream, until: Instant) -> io::Result<(u64, u64)> {
    let piece = vec![0x5a; PIECE];
    let mut sent = 0;
    while Instant::now() < until {
        stream.write_all(&piece)?;
        sent += piece.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut confirmed = [0; 8];
    stream.read_exact(&mut confirmed)?;
    Ok((sent, u64::from_le_bytes(confirmed)))
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that live as long as the client: the kernel forgets how much processor time a thread took when it ends.
struct Workers(Vec<Mutex<Sender<Job>>>);

impl Workers {
    fn start(count: usize) -> io::Result<Workers> {
        let start = |number| {
            let (sender, jobs) = mpsc::channel::<Job>();
            let body = move || jobs.iter().for_each(|job| job());
            std::thread::Builder::new().name(format!("worker-{number}")).spawn(body)?;
            Ok(Mutex::new(sender))
        };
        (0..count).map(start).collect::<io::Result<_>>().map(Workers)
    }

    fn start_one<T: Send + 'static>(
        &self,
        number: usize,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<mpsc::Receiver<T>> {
        let Some(worker) = self.0.get(number) else { bail!("at most {WORKERS} at once") };
        let (sender, result) = mpsc::channel();
        let boxed: Job = Box::new(move || drop(sender.send(job())));
        worker
            .lock()
            .map_err(|_| anyhow!("a worker has panicked"))?
            .send(boxed)
            .map_err(|_| anyhow!("a worker has ended"))?;
        Ok(result)
    }

    /// Runs `job` on so many of them at once and waits for all.
    fn run<T: Send + 'static>(&self, count: usize, job: impl Fn(usize) -> T + Send + Sync + 'static) -> Result<Vec<T>> {
        let job = Arc::new(job);
        let start = |number| {
            let job = job.clone();
            self.start_one(number, move || job(number))
        };
        let started: Vec<_> = (0..count).map(start).collect::<Result<_>>()?;
        started.into_iter().map(|one| one.recv().context("a worker has ended")).collect()
    }
}
