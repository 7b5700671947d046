//! A Unix socket that some may open: who may is decided by the kernel's word for the peer, not by what it says.

use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::channel::{Channel, Listener, Peer};
use prometheus_client::metrics::counter::Counter;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::watched::watched;

/// The pause after an accept that failed for want of descriptors: the connection is still there, and would be tried again
/// at once for ever.
const BREATH: Duration = Duration::from_millis(100);

/// A listening socket, open to some users.
#[derive(Debug)]
pub(crate) struct Door {
    listener: AsyncFd<Listener>,
    path: PathBuf,
    /// Who may come in.
    users: Vec<u32>,
    /// How many were sent away.
    strangers: Counter,
}

impl Door {
    /// Listens at `path`. The file belongs to `owner` and can be opened by nobody else but root; `users` come in.
    ///
    /// # Errors
    /// The socket cannot be made there, or not be given to `owner`.
    pub(crate) fn open(path: &Path, owner: u32, users: Vec<u32>, strangers: &Counter) -> io::Result<Self> {
        let listener = Listener::bind(path, 0o600)?;
        listener.set_nonblocking(true)?;
        // Until here it was ours alone. Only where it differs: giving away takes a capability.
        if owner != own_uid()? {
            chown(path, Some(owner), None)?;
        }
        Ok(Self { listener: watched(listener)?, path: path.to_owned(), users, strangers: strangers.clone() })
    }

    /// The next peer that may come in. Others are sent away, said by name and counted.
    pub(crate) async fn next(&self) -> AsyncFd<Channel> {
        loop {
            let admitted = match self.listener.async_io(Interest::READABLE, Listener::accept).await {
                Ok(channel) => self.admit(channel),
                Err(error) => Err(error),
            };
            match admitted {
                Ok(Some(channel)) => return channel,
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(socket = %self.path.display(), %error, "cannot accept a connection");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    }

    fn admit(&self, channel: Channel) -> io::Result<Option<AsyncFd<Channel>>> {
        let peer = channel.peer_credentials()?;
        if !may_enter(&self.users, peer) {
            tracing::warn!(socket = %self.path.display(), pid = peer.pid, uid = peer.uid, "refused a stranger");
            self.strangers.inc();
            return Ok(None);
        }
        channel.set_nonblocking(true)?;
        watched(channel).map(Some)
    }
}

/// The uid that this process acts as.
///
/// # Errors
/// `/proc` is not there.
pub(crate) fn own_uid() -> io::Result<u32> {
    Ok(linux::privileges::describe()?.uid)
}

/// Root is no exception: a process of root that is not the one meant has no business here.
fn may_enter(users: &[u32], peer: Peer) -> bool {
    users.contains(&peer.uid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn who_may_enter_is_decided_by_uid_alone() {
        let peer = |uid| Peer { pid: 1, uid, gid: 0 };
        assert!(may_enter(&[4242], peer(4242)));
        assert!(!may_enter(&[4242], peer(0)) && !may_enter(&[4242], peer(4243)) && !may_enter(&[], peer(0)));
    }

    #[tokio::test]
    async fn a_stranger_is_sent_away_and_a_friend_comes_in() {
        let place = tempfile::tempdir().unwrap();
        let own = own_uid().unwrap();
        for (users, enters) in [(vec![own.wrapping_add(1)], false), (vec![own], true)] {
            let path = place.path().join("socket");
            let strangers = Counter::default();
            let door = Door::open(&path, own, users, &strangers).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let outside = Channel::connect(&path).unwrap();
            let heard = tokio::task::spawn_blocking(move || outside.recv(&mut [0; 16]).unwrap().0);
            let mut heard = std::pin::pin!(heard);
            tokio::select! {
                inside = door.next() => {
                    inside.get_ref().send(b"welcome", &[]).unwrap();
                    assert_eq!((heard.await.unwrap(), enters), (7, true));
                }
                // Nothing was said before the end: the door has sent it away.
                length = &mut heard => assert_eq!((length.unwrap(), enters), (0, false)),
            }
            assert_eq!(strangers.get(), u64::from(!enters));
        }
    }
}
