//! Clocks that nobody sets: one that all processes of a machine share, and each thread's own.

#![allow(unsafe_code)]

use std::time::Duration;

/// The time since the machine started, sleep included (`CLOCK_BOOTTIME`).
pub fn since_boot() -> Duration {
    read(libc::CLOCK_BOOTTIME)
}

/// The processor time that the calling thread has used (`CLOCK_THREAD_CPUTIME_ID`).
pub fn of_thread() -> Duration {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn read(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the whole call, and the clocks above have been there since Linux 2.6.39.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
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

    #[test]
    fn the_time_of_a_thread_that_works_is_not_that_of_one_that_waits_for_it() {
        const WORK: Duration = Duration::from_millis(50);
        let before = of_thread();
        let worked = std::thread::spawn(|| while of_thread() < WORK {}).join();
        assert!(worked.is_ok() && of_thread() - before < WORK / 2);
    }
}
