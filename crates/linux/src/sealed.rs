//! Memory that passes from process to process as a descriptor, and that nobody can change any more.
//!
//! Who holds the descriptor needs not map or read it to keep it. It is no file in any directory, is never written to a
//! disk but with the rest of memory, and is gone with its last holder.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Nothing can be written, cut off, added or unsealed.
const SEALS: SealFlag =
    SealFlag::F_SEAL_WRITE.union(SealFlag::F_SEAL_SHRINK).union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// Makes one with this content. `name` shows in `/proc`.
///
/// # Errors
/// There is no memory or no descriptor left.
pub fn seal(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // Kernels before 6.3 do not know that a file need not be a program; some later ones demand that it is said.
    let made = match memfd_create(name, flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
        Err(Errno::EINVAL) => memfd_create(name, flags),
        made => made,
    };
    let mut file = File::from(made?);
    file.write_all(content)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file.into())
}

/// Reads one into a buffer that is made once, in its final size: whoever reads a secret has one copy to wipe.
///
/// # Errors
/// It is not sealed, and so may change while it is read; it is longer than `most`; or it is none.
pub fn read(sealed: &impl AsFd, most: u64) -> io::Result<Vec<u8>> {
    let seals = SealFlag::from_bits_retain(fcntl(sealed, FcntlArg::F_GET_SEALS)?);
    if !seals.contains(SEALS) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the memory is not sealed"));
    }
    let file = File::from(sealed.as_fd().try_clone_to_owned()?);
    let length = file.metadata()?.len();
    if length > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes are more than {most}")));
    }
    let mut content = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut content, 0)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_often_as_wanted_and_written_never_again() {
        let sealed = seal("test", b"content").unwrap();
        for _ in 0..2 {
            assert_eq!(read(&sealed, 7).unwrap(), b"content");
        }
        let mut file = File::from(sealed);
        assert_eq!(file.write(b"x").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn what_is_too_long_or_not_sealed_is_refused() {
        let sealed = seal("test", b"content").unwrap();
        assert_eq!(read(&sealed, 6).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let open = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert_eq!(read(&open, 6).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(read(&File::open("/dev/null").unwrap(), 6).is_err());
    }
}
