//! A listener for strangers: few connections at once, and each for a short time, so that whoever says nothing, or reads
//! nothing, takes nothing from the process, whose descriptors these are.
//!
//! Nor from who asks next, which may be kubelet: when all places are taken, a new connection has the oldest one's of the source
//! that holds most. To close the new one in its place, or to limit each source, would shut kubelet out: what comes through a
//! Service may have the address of the node, which is kubelet's, too.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};

/// Connections at the same time.
const AT_ONCE: usize = 128;

/// How long one may last.
const LASTS: Duration = Duration::from_secs(10);

/// The listener.
#[derive(Debug)]
pub struct Bounded {
    listener: TcpListener,
    places: Arc<Places>,
}

impl Bounded {
    /// A listener that lets few in at once.
    pub fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::default() }
    }
}

impl Listener for Bounded {
    type Io = Brief;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Brief, SocketAddr) {
        // Errors of one connection are its own; where descriptors are short, axum's way is to wait.
        let (tcp, address) = Listener::accept(&mut self.listener).await;
        let place = Places::take(&self.places, address.ip());
        (Brief { tcp, end: Box::pin(sleep(LASTS)), place, is_over: false }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Who holds places.
#[derive(Default, Debug)]
struct Places(Mutex<Taken>);

#[derive(Default, Debug)]
struct Taken {
    /// By source, the oldest first. Whose sender is dropped has lost its place.
    by_source: HashMap<IpAddr, VecDeque<(u64, oneshot::Sender<Infallible>)>>,
    count: usize,
    next: u64,
}

/// One connection's place, until it is dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    source: IpAddr,
    number: u64,
    lost: oneshot::Receiver<Infallible>,
}

impl Places {
    /// A place for one more, where need be somebody else's.
    fn take(places: &Arc<Self>, source: IpAddr) -> Place {
        let mut taken = places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.count >= AT_ONCE {
            taken.take_back();
        }
        let (number, (held, lost)) = (taken.next, oneshot::channel());
        taken.next += 1;
        taken.count += 1;
        taken.by_source.entry(source).or_default().push_back((number, held));
        Place { places: places.clone(), source, number, lost }
    }
}

impl Taken {
    /// The oldest connection of the source that holds most; of several such sources, the oldest of all.
    fn take_back(&mut self) {
        let oldest = |held: &VecDeque<(u64, _)>| held.front().map(|(number, _)| u64::MAX - number);
        let most = self.by_source.iter().max_by_key(|(_, held)| (held.len(), oldest(held)));
        let number = most.and_then(|(source, held)| Some((*source, held.front()?.0)));
        if let Some((source, number)) = number {
            self.give_back(source, number);
        }
    }

    fn give_back(&mut self, source: IpAddr, number: u64) {
        let Some(held) = self.by_source.get_mut(&source) else { return };
        let before = held.len();
        held.retain(|(other, _)| *other != number);
        self.count -= before - held.len();
        if held.is_empty() {
            self.by_source.remove(&source);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.0.lock().unwrap_or_else(PoisonError::into_inner).give_back(self.source, self.number);
    }
}

/// A connection that ends by itself.
#[derive(Debug)]
pub struct Brief {
    tcp: TcpStream,
    end: Pin<Box<Sleep>>,
    place: Place,
    is_over: bool,
}

impl Brief {
    /// Waits until its time is over, or its place somebody else's: whoever waits for something else meanwhile must wait for this, too.
    pub async fn ended(&mut self) {
        poll_fn(|context| if self.check(context).is_err() { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// An error once its time is over, or its place somebody else's. Its task is woken then.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        // Neither is asked again once it has answered.
        self.is_over = self.is_over
            || self.end.as_mut().poll(context).is_ready()
            || Pin::new(&mut self.place.lost).poll(context).is_ready();
        if self.is_over { Err(ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

impl AsyncRead for Brief {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.tcp).poll_read(context, buffer)
    }
}

impl AsyncWrite for Brief {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.tcp).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What ends in order may take the time that is left.
        if self.check(context).is_err() {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.tcp).poll_shutdown(context))?;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;
    use tokio::task::JoinHandle;
    use tokio::time::{advance, pause, resume, timeout};

    use super::*;

    async fn serve() -> (SocketAddr, JoinHandle<io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(async || "here"));
        (address, tokio::spawn(axum::serve(Bounded::new(listener), router).into_future()))
    }

    async fn connect(from: &str, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
        socket.connect(to).await.unwrap()
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(LASTS / 2, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    async fn is_closed(stream: &mut TcpStream) -> bool {
        matches!(timeout(LASTS / 2, stream.read(&mut [0; 8])).await, Ok(Ok(0) | Err(_)))
    }

    #[tokio::test]
    async fn whoever_says_nothing_holds_a_place_for_a_short_time() {
        let (address, serving) = serve().await;
        let mut silent = connect("127.0.0.1", address).await;
        // It is accepted by now: connections are in turn.
        assert!(ask(&mut connect("127.0.0.1", address).await).await.ends_with("here"));
        pause();
        advance(LASTS).await;
        resume();
        assert!(is_closed(&mut silent).await);
        serving.abort();
    }

    #[tokio::test]
    async fn whoever_holds_most_makes_room_for_the_next_and_who_holds_few_keeps_them() {
        let (address, serving) = serve().await;
        let mut quiet = connect("127.0.0.2", address).await;
        let mut silent = Vec::new();
        for _ in 0..2 * AT_ONCE {
            silent.push(connect("127.0.0.1", address).await);
        }
        // From the address of those that take all there is.
        assert!(ask(&mut connect("127.0.0.1", address).await).await.ends_with("here"));
        for early in &mut silent[..AT_ONCE] {
            assert!(is_closed(early).await, "more places than promised");
        }
        assert!(ask(&mut quiet).await.ends_with("here"));
        assert!(ask(silent.last_mut().unwrap()).await.ends_with("here"));
        serving.abort();
    }

    #[tokio::test]
    async fn who_has_lost_its_place_may_be_asked_again_and_again() {
        let mut listener = Bounded::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let (mut first, mut others) = (None, Vec::new());
        for _ in 0..=AT_ONCE {
            let (client, (brief, _)) = tokio::join!(connect("127.0.0.1", address), listener.accept());
            match &mut first {
                None => first = Some((client, brief)),
                Some(_) => others.push((client, brief)),
            }
        }
        let (_client, mut brief) = first.unwrap();
        timeout(LASTS / 2, brief.ended()).await.unwrap();
        assert!(brief.read(&mut [0; 8]).await.is_err() && brief.flush().await.is_err());
        brief.shutdown().await.unwrap();
        assert!(timeout(Duration::from_millis(50), others[0].1.ended()).await.is_err());
    }

    #[test]
    fn places_are_given_back_and_among_equals_the_oldest_goes_first() {
        let places = Arc::new(Places::default());
        let source = |number: usize| IpAddr::from([10, 0, (number / 256) as u8, (number % 256) as u8]);
        let mut held: Vec<_> = (0..AT_ONCE).map(|number| Places::take(&places, source(number))).collect();
        let last = Places::take(&places, source(AT_ONCE));
        let is_lost = |place: &mut Place| place.lost.try_recv() == Err(oneshot::error::TryRecvError::Closed);
        let lost: Vec<_> = held.iter_mut().map(is_lost).collect();
        assert!(lost[0] && lost[1..].iter().all(|lost| !lost), "{lost:?}");
        drop((held, last));
        let taken = places.0.lock().unwrap();
        assert!(taken.count == 0 && taken.by_source.is_empty(), "{taken:?}");
    }
}
