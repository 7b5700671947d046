//! Descriptors in the event queue.

use std::io;
use std::os::fd::AsRawFd;

use linux::changes::Changes;
use linux::channel::{Channel, Listener};
use tokio::io::unix::AsyncFd;

/// What owns its descriptor and keeps that one while it lives, which is all that [`AsyncFd`] needs to be sound.
pub(crate) trait KeepsItsDescriptor: AsRawFd {}

impl KeepsItsDescriptor for Listener {}
impl KeepsItsDescriptor for Channel {}
impl KeepsItsDescriptor for Changes {}

/// Puts a non-blocking descriptor into the event queue of this thread's runtime. Dropping the result takes it out.
///
/// # Errors
/// The kernel does not let it be watched.
#[expect(deprecated, reason = "the successor is the same function as `unsafe`, which this crate does not allow")]
pub(crate) fn watched<T: KeepsItsDescriptor>(inner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(inner)
}
