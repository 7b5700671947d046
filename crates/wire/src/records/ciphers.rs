//! The ciphers that a core has used last. One takes six hundred bytes (the expanded key, and tables for its authentication)
//! and a quarter of a microsecond to make: a connection that rests keeps its key alone, and who talks finds its cipher here.

use std::cell::RefCell;

use super::aead::Cipher;

/// How many of them each core keeps. Two keys with the same place take it from each other, which costs time and nothing else.
const PLACES: u64 = 256;

/// The places, each with the key's number. There are none before the first is needed.
type Places = Vec<Option<(u64, Cipher)>>;

thread_local! {
    static PLACES_OF_THIS_CORE: RefCell<Places> = const { RefCell::new(Vec::new()) };
}

/// Works with the cipher of key `id`, which is made where it is not here.
pub(super) fn with<T>(id: u64, make: impl FnOnce() -> Cipher, work: impl FnOnce(&Cipher) -> T) -> T {
    PLACES_OF_THIS_CORE.with_borrow_mut(|places| {
        if places.is_empty() {
            places.resize_with(PLACES as usize, || None);
        }
        let place = &mut places[(id % PLACES) as usize];
        if !matches!(place, Some((of, _)) if *of == id) {
            // What was there is gone before the new one takes its room.
            *place = None;
        }
        let (_, cipher) = place.get_or_insert_with(|| (id, make()));
        work(cipher)
    })
}

/// Key `id` is not used any more: its cipher does not outlive it. Where it was used on another core before, the next key with
/// its place overwrites it there.
pub(super) fn forget(id: u64) {
    // A thread that ends has none left.
    let _ = PLACES_OF_THIS_CORE.try_with(|places| {
        let mut places = places.borrow_mut();
        if let Some(place) = places.get_mut((id % PLACES) as usize)
            && matches!(place, Some((of, _)) if *of == id)
        {
            *place = None;
        }
    });
}
