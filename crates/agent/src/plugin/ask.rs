//! One question to the node's agent, which may be about to start.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use linux::channel::Channel;
use linux::netns::NetNs;
use wire::pods::{CniRequest, CniResult, MAX_MESSAGE};

/// The pause between two attempts.
const AGAIN: Duration = Duration::from_millis(100);

/// How long the agent is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until it is there, also when it goes while it is asked: one that is replaced is back within a second.
    pub(super) there: Duration,
    /// Until it has answered. A capture takes milliseconds, and an agent that cannot do it says so after 20 s.
    pub(super) answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { there: Duration::from_secs(10), answer: Duration::from_secs(60) }
    }
}

impl Patience {
    /// For what goes on without the agent, too.
    pub(super) fn brief(self) -> Self {
        let brief = Duration::from_secs(2);
        Self { there: self.there.min(brief), answer: self.answer.min(brief) }
    }
}

/// Asks, and asks again where the agent is not there or goes meanwhile.
///
/// # Errors
/// Why there is no answer.
pub(super) fn ask(
    socket: &Path,
    request: &CniRequest,
    namespace: Option<&NetNs>,
    patience: Patience,
) -> Result<CniResult, String> {
    let begun = Instant::now();
    let mut last_there = begun;
    loop {
        let left = patience.answer.saturating_sub(begun.elapsed());
        let error = match Channel::connect(socket) {
            Ok(channel) => match converse(&channel, request, namespace, left.max(AGAIN)) {
                Ok(answer) => return Ok(answer),
                // It is there, and has not answered in all that time.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(format!("no answer within {} s", patience.answer.as_secs()));
                }
                Err(error) => {
                    last_there = Instant::now();
                    error
                }
            },
            Err(error) => error,
        };
        if last_there.elapsed() >= patience.there || left.is_zero() {
            return Err(error.to_string());
        }
        sleep(AGAIN);
    }
}

fn converse(
    channel: &Channel,
    request: &CniRequest,
    namespace: Option<&NetNs>,
    patience: Duration,
) -> io::Result<CniResult> {
    channel.set_patience(patience)?;
    let namespace: Vec<_> = namespace.map(AsFd::as_fd).into_iter().collect();
    channel.send(&request.encode(), &namespace)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    let (length, _) = channel.recv(&mut buffer)?;
    if length == 0 {
        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it closed the connection"));
    }
    CniResult::decode(&buffer[..length]).map_err(io::Error::other)
}
