//! A socket that carries messages and sockets: unix, SEQPACKET, SCM_RIGHTS.
//!
//! A message arrives whole or not at all, with all its descriptors or as an error: one that does not
//! fit is refused, and what came with it is closed. Every descriptor received has CLOEXEC from its
//! first moment, and an owner.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, socketpair,
};

/// The most bytes of a message.
pub const LARGEST_MESSAGE: usize = 64 * 1024;
/// The most descriptors in a message: the kernel's `SCM_MAX_FD`.
pub const MOST_DESCRIPTORS: usize = 253;

/// The process at the other end, as it was when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its process id, in the reader's pid namespace; 0 when it has none there.
    pub pid: i32,
    /// Its effective uid, in the reader's user namespace.
    pub uid: u32,
    /// Its effective gid.
    pub gid: u32,
}

/// Where channels come in.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Listens at `path`, with the file permissions `mode`. What was at the path is replaced in one
    /// step, so that a process that dies leaves nothing in its successor's way, and nobody can connect
    /// before the permissions are set.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Listener> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = Path::new(&new);
        match fs::remove_file(new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let fd = seqpacket()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(new)?)?;
        fs::set_permissions(new, fs::Permissions::from_mode(mode))?;
        listen(&fd, Backlog::new(64)?)?;
        fs::rename(new, path)?;
        Ok(Listener { fd })
    }

    /// The next channel; blocks, or fails with `WouldBlock` when non-blocking. The channel itself
    /// blocks until it is told otherwise.
    pub fn accept(&self) -> io::Result<Channel> {
        // SAFETY: a listening socket; no address is asked for, so both pointers may be null.
        let fd = unsafe {
            libc::accept4(self.fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: accept4 returned a new descriptor, which nobody else has.
        Ok(Channel { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Whether [`Listener::accept`] may block.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        set_nonblocking(&self.fd, nonblocking)
    }
}

/// One end of a conversation.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

impl Channel {
    /// Connects to the listener at `path`.
    pub fn connect(path: &Path) -> io::Result<Channel> {
        let fd = seqpacket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Channel { fd })
    }

    /// Two channels that are each other's end.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Channel { fd: a }, Channel { fd: b }))
    }

    /// Sends one message, 1 to [`LARGEST_MESSAGE`] bytes, with at most [`MOST_DESCRIPTORS`]
    /// descriptors, which stay open here. All of it is sent, or nothing.
    pub fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        // An empty message could not be told from the end of the conversation.
        if message.is_empty() || message.len() > LARGEST_MESSAGE {
            return Err(invalid("a message must have 1 to 65536 bytes"));
        }
        if descriptors.len() > MOST_DESCRIPTORS {
            return Err(invalid("a message may carry at most 253 descriptors"));
        }
        let mut part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
        let mut control = Control::new();
        // SAFETY: all zeros is an empty message header.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        if !descriptors.is_empty() {
            let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
            let length = size_of_val(raw.as_slice()) as u32;
            header.msg_control = control.as_mut_ptr();
            // SAFETY: arithmetic only.
            header.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as usize;
            // SAFETY: `control` has room for a header and MOST_DESCRIPTORS descriptors, is aligned
            // for a header, and there are no more descriptors than that.
            unsafe {
                let first = libc::CMSG_FIRSTHDR(&header);
                (*first).cmsg_level = libc::SOL_SOCKET;
                (*first).cmsg_type = libc::SCM_RIGHTS;
                (*first).cmsg_len = libc::CMSG_LEN(length) as usize;
                let data = libc::CMSG_DATA(first).cast::<RawFd>();
                std::ptr::copy_nonoverlapping(raw.as_ptr(), data, raw.len());
            }
        }
        // SAFETY: the header points at `part`, `message` and `control`, which outlive the call. NOSIGNAL:
        // a peer that is gone is an error here, not the end of this process.
        let sent = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
        match sent {
            ..0 => Err(io::Error::last_os_error()),
            sent if sent as usize == message.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Receives one message into `buffer` and says how long it is, with its descriptors. A length of 0 is the
    /// end of the conversation. A message that is longer than `buffer`, or has more descriptors than a
    /// message may, is an error; it is gone, and so are its descriptors.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut control = Control::new();
        // SAFETY: all zeros is an empty message header.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr();
        header.msg_controllen = size_of::<Control>();
        // SAFETY: the header points at `part`, `buffer` and `control`, which outlive the call.
        let received = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
        if received < 0 {
            return Err(io::Error::last_os_error());
        }
        // Before anything can fail: from here on each descriptor is closed when it is dropped.
        let descriptors = take_descriptors(&header);
        if header.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a message is longer than it may be, or has more descriptors",
            ));
        }
        Ok((received as usize, descriptors))
    }

    /// Who is at the other end.
    pub fn peer_credentials(&self) -> io::Result<Peer> {
        let peer = getsockopt(&self.fd, PeerCredentials)?;
        Ok(Peer { pid: peer.pid(), uid: peer.uid(), gid: peer.gid() })
    }

    /// Whether sending and receiving may block.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        set_nonblocking(&self.fd, nonblocking)
    }

    /// How long sending and receiving may block; then they fail with `WouldBlock`.
    pub fn set_patience(&self, patience: std::time::Duration) -> io::Result<()> {
        let socket = socket2::SockRef::from(&self.fd);
        socket.set_read_timeout(Some(patience))?;
        socket.set_write_timeout(Some(patience))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Room for one header and the most descriptors, aligned as a header must be.
#[repr(C)]
struct Control {
    _header: [libc::cmsghdr; 1],
    _descriptors: [RawFd; MOST_DESCRIPTORS + 1],
}

impl Control {
    fn new() -> Control {
        // SAFETY: integers, for which zeros are values.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }

    fn as_mut_ptr(&mut self) -> *mut libc::c_void {
        (&raw mut *self).cast()
    }
}

/// Owns every descriptor that the kernel put into the header's control data.
fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel filled the control data and set its length, within which these macros stay;
    // the descriptors in an SCM_RIGHTS message are new, open, and nobody else's.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while !next.is_null() {
            if (*next).cmsg_level == libc::SOL_SOCKET && (*next).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*next).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(next).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    descriptors
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

fn set_nonblocking(fd: &OwnedFd, nonblocking: bool) -> io::Result<()> {
    socket2::SockRef::from(fd).set_nonblocking(nonblocking)
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| fs::File::open("/dev/null").unwrap().into()).collect()
    }

    fn borrow(descriptors: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
        descriptors.iter().map(AsFd::as_fd).collect()
    }

    fn place(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("justmtls-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_message_arrives_whole_with_a_socket_that_works() {
        let (a, b) = Channel::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        a.send(b"one", &[far.as_fd()]).unwrap();
        a.send(b"two", &[]).unwrap();
        let mut buffer = [0; LARGEST_MESSAGE];
        let (length, mut sockets) = b.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"one");
        near.write_all(b"hello").unwrap();
        let mut text = [0; 5];
        UnixStream::from(sockets.pop().unwrap()).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        let (length, none) = b.recv(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], none.len()), (b"two".as_slice(), 0));
    }

    #[test]
    fn the_most_bytes_and_descriptors_pass_with_cloexec() {
        let (a, b) = Channel::pair().unwrap();
        let sent = descriptors(MOST_DESCRIPTORS);
        a.send(&[7; LARGEST_MESSAGE], &borrow(&sent)).unwrap();
        let mut buffer = vec![0; LARGEST_MESSAGE];
        let (length, received) = b.recv(&mut buffer).unwrap();
        assert_eq!((length, received.len()), (LARGEST_MESSAGE, MOST_DESCRIPTORS));
        for descriptor in received {
            let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", descriptor.as_raw_fd()));
            let flags = info.unwrap();
            let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            assert_ne!(flags & libc::O_CLOEXEC, 0);
        }
    }

    #[test]
    fn too_much_is_refused_by_the_sender() {
        let (a, _b) = Channel::pair().unwrap();
        let many = descriptors(MOST_DESCRIPTORS + 1);
        for (message, descriptors) in
            [(vec![], vec![]), (vec![0; LARGEST_MESSAGE + 1], vec![]), (vec![0], borrow(&many))]
        {
            let error = a.send(&message, &descriptors).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error_and_its_descriptors_are_closed() {
        let (a, b) = Channel::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        a.send(b"too long", &[far.as_fd()]).unwrap();
        drop(far);
        let error = b.recv(&mut [0; 3]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        // Were the received copy still open, this would wait for ever.
        assert_eq!(near.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_end_is_a_length_of_zero() {
        let (a, b) = Channel::pair().unwrap();
        drop(a);
        assert_eq!(b.recv(&mut [0; 8]).unwrap().0, 0);
        assert_eq!(b.send(b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_listener_replaces_what_a_dead_one_left_and_knows_its_peer() {
        let path = place("channel");
        drop(Listener::bind(&path, 0o600).unwrap());
        assert!(Channel::connect(&path).is_err());
        let listener = Listener::bind(&path, 0o640).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let client = Channel::connect(&path).unwrap();
        let server = listener.accept().unwrap();
        let me = server.peer_credentials().unwrap();
        assert_eq!(me.pid, std::process::id() as i32);
        assert_eq!(me.uid, nix::unistd::geteuid().as_raw());
        client.send(b"x", &[]).unwrap();
        assert_eq!(server.recv(&mut [0; 8]).unwrap().0, 1);
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.recv(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        fs::remove_file(&path).unwrap();
    }
}
