//! Processor time: who used how much of it, on which processor, and what others used meanwhile.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A tick of `/proc/stat`; USER_HZ is 100 on every architecture that justmtls runs on.
const TICK: Duration = Duration::from_millis(10);

/// The first two processors that this process may use.
///
/// # Errors
/// There are fewer.
pub(crate) fn two_processors() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("cannot ask which processors may be used")?;
    let mut all = (0..CpuSet::count()).filter(|number| allowed.is_set(*number).unwrap_or(false));
    match (all.next(), all.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        _ => bail!("this needs two processors: the proxies' and the programs' own"),
    }
}

/// Binds all threads of a process to one processor; what they start later is bound, too.
pub(crate) fn pin(pid: u32, processor: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(processor)?;
    // Twice: a thread may have been started by one that was not bound yet.
    for _ in 0..2 {
        for thread in threads(pid) {
            // A thread that has ended needs no processor.
            let _ = sched_setaffinity(Pid::from_raw(thread as i32), &set);
        }
    }
    Ok(())
}

/// Runs `work` with the calling thread bound to one processor, which what it starts inherits.
pub(crate) fn pinned<T>(processor: usize, work: impl FnOnce() -> T) -> Result<T> {
    let before = sched_getaffinity(Pid::from_raw(0))?;
    let mut set = CpuSet::new();
    set.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    let result = work();
    sched_setaffinity(Pid::from_raw(0), &before)?;
    Ok(result)
}

/// The processor time of a process so far, to the nanosecond, of those of its threads that live.
pub(crate) fn time(pid: u32) -> Duration {
    let of_thread = |thread: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|nanoseconds| nanoseconds.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads(pid).into_iter().map(of_thread).sum())
}

/// The processor time of many.
pub(crate) fn time_of_all(pids: &[u32]) -> Duration {
    pids.iter().map(|pid| time(*pid)).sum()
}

/// What the machine did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Time in which processors were not idle, interrupts included.
    pub(crate) busy: Duration,
    /// Time that the hypervisor gave to others.
    pub(crate) stolen: Duration,
}

/// Reads it.
pub(crate) fn machine() -> Result<Machine> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    Ok(machine_of(text.lines().next().unwrap_or_default()))
}

/// `cpu user nice system idle iowait irq softirq steal …`
fn machine_of(line: &str) -> Machine {
    let ticks: Vec<u32> = line.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect();
    let sum = |fields: &[usize]| TICK * fields.iter().filter_map(|field| ticks.get(*field)).sum::<u32>();
    Machine { busy: sum(&[0, 1, 2, 5, 6]), stolen: sum(&[7]) }
}

/// The threads in which the kernel does what packets leave for later.
pub(crate) fn packet_threads() -> Vec<u32> {
    let is_one =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"));
    numbers("/proc").into_iter().filter(is_one).collect()
}

/// A process' children, of all its threads.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let of_thread = |thread| fs::read_to_string(format!("/proc/{pid}/task/{thread}/children")).unwrap_or_default();
    let lists = threads(pid).into_iter().map(of_thread);
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// How many threads it has.
pub(crate) fn threads(pid: u32) -> Vec<u32> {
    numbers(&format!("/proc/{pid}/task"))
}

fn numbers(folder: &str) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_time_is_not_busy_and_stolen_time_is_apart() {
        let machine = machine_of("cpu  100 1 20 5000 900 3 6 7 0 0");
        assert_eq!(machine, Machine { busy: TICK * 130, stolen: TICK * 7 });
    }

    #[test]
    fn a_process_uses_time_and_its_threads_are_seen() {
        let own = std::process::id();
        let before = time(own);
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(5) {}
        assert!(time(own) > before);
        assert!(threads(own).contains(&own));
    }
}
