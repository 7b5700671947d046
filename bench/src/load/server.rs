//! The server: sends back what comes, or counts it.

use std::cell::RefCell;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;

use anyhow::{Context, Result};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::LocalOptions;
use tokio::task::{spawn_local, yield_now};

use crate::congestion;

use super::{ECHO, SINK, at, end_with_the_caller};

/// The most that is read at once.
const PIECE: usize = 256 * 1024;
/// Reads before other connections have their turn.
const TURN: u32 = 4;
/// Connections that may wait on one port.
const BACKLOG: u32 = 512;

/// Where all connections of the thread read to.
type Scratch = Rc<RefCell<Vec<u8>>>;

/// What the server is started with.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The first port.
    #[arg(long)]
    first: u16,
    /// How many ports, one after the other.
    #[arg(long)]
    ports: u16,
}

/// Serves until standard input ends. Says `ready` when all ports listen.
pub(crate) fn run(args: &Args) -> Result<()> {
    linux::privileges::raise_descriptor_limit().context("cannot raise the limit of open descriptors")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let scratch: Scratch = Rc::new(RefCell::new(vec![0; PIECE]));
        for port in (args.first..).take(usize::from(args.ports)) {
            let listener = listen(port).with_context(|| format!("cannot listen on port {port}"))?;
            spawn_local(accept(listener, scratch.clone()));
        }
        println!("ready");
        io::stdout().flush()?;
        end_with_the_caller();
        std::future::pending().await
    })
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    // A client within the pod, as a proxy is one, has no route to take it from.
    SockRef::from(&socket).set_tcp_congestion(congestion::NAME.as_bytes())?;
    socket.bind(at(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, scratch: Scratch) {
    while let Ok((stream, _)) = listener.accept().await {
        let scratch = scratch.clone();
        // A client that goes away in the middle knows that itself.
        spawn_local(async move { serve(&stream, &scratch).await.ok() });
    }
}

async fn serve(stream: &TcpStream, scratch: &Scratch) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut verb = [0];
    while read(stream, &mut verb).await? == 0 {}
    write(stream, &verb).await?;
    match verb[0] {
        SINK => count(stream, scratch).await,
        ECHO => echo(stream, scratch).await,
        _ => Ok(()),
    }
}

async fn echo(stream: &TcpStream, scratch: &Scratch) -> io::Result<()> {
    loop {
        stream.readable().await?;
        let rest = {
            let buffer = &mut *scratch.borrow_mut();
            let length = match stream.try_read(buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let written = match stream.try_write(&buffer[..length]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                other => other?,
            };
            buffer[written..length].to_vec()
        };
        write(stream, &rest).await?;
    }
}

async fn count(stream: &TcpStream, scratch: &Scratch) -> io::Result<()> {
    let (mut bytes, mut turn) = (0_u64, TURN);
    loop {
        stream.readable().await?;
        match stream.try_read(&mut scratch.borrow_mut()) {
            Ok(0) => break,
            Ok(length) => bytes += length as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        turn -= 1;
        if turn == 0 {
            yield_now().await;
            turn = TURN;
        }
    }
    write(stream, &bytes.to_le_bytes()).await
}

async fn read(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    stream.readable().await?;
    match stream.try_read(buffer) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

async fn write(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
