//! Chance, for spreading load and jitter: no secret hangs on it.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A number that the next call will not repeat, from the process's own random state.
pub fn roll() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A number from 0 to 1.
pub fn fraction() -> f64 {
    // 53 bits fill the mantissa: all of them, and the division, are exact.
    (roll() >> 11) as f64 / ((1_u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rolls_differ_and_fractions_stay_in_their_range() {
        let rolls: std::collections::HashSet<u64> = (0..1000).map(|_| roll()).collect();
        assert!(rolls.len() > 990, "{} different rolls of 1000", rolls.len());
        assert!((0..1000).map(|_| fraction()).all(|fraction| (0.0..1.0).contains(&fraction)));
    }
}
