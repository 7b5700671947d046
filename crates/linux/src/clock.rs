//! A clock that all processes of a machine share and that nobody sets.

#![allow(unsafe_code)]

use std::time::Duration;

/// The time since the machine started, sleep included (`CLOCK_BOOTTIME`).
pub fn since_boot() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the whole call, and this clock has been there since Linux 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_and_never_back() {
        let before = since_boot();
        assert!(before > Duration::ZERO && since_boot() >= before);
    }
}
