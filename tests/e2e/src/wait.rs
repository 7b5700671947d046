//! Waiting for a condition, with an end.

use std::time::{Duration, Instant};

/// How long anything that should happen at once may take on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How often a condition is looked at. Most of them start a process; less often would make tests slow, more often the machine.
const LOOK: Duration = Duration::from_millis(5);

/// The time between two looks: the one place where the tests let time pass without a condition.
pub(crate) fn pause() {
    std::thread::park_timeout(LOOK);
}

/// Waits until `look` gives a value. After `within`, panics and says what was waited for and what was there instead.
#[track_caller]
pub fn wait_until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + within;
    loop {
        let found = match look() {
            Ok(value) => return value,
            Err(found) => found,
        };
        assert!(Instant::now() < deadline, "waited {within:?} for {what}; instead: {found}");
        pause();
    }
}

/// Waits until `holds` is true.
#[track_caller]
pub fn eventually(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    wait_until(what, within, || if holds() { Ok(()) } else { Err("not so".to_owned()) });
}
