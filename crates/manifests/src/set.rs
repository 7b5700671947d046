//! The objects of a folder of manifests, by key, and what a change of one file changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::object::{Object, ObjectKey};
use crate::parse::{Parsed, parse};
use crate::problem::{Location, Problem, Severity};

/// Objects of any number of files.
///
/// **The last good state stays.** When a file is read again ([`Set::reload`]), an object of it goes only if the new text is
/// certain not to have it. It stays as it was
/// - if its document is there and cannot be taken (a port of 70000, an unknown mode);
/// - if any part of the new text cannot be said to be any particular object (it does not scan, or has no kind or name): that
///   part may be the object. A slip of the finger must not delete a policy, and so open what it closed.
///
/// **The order of events decides nothing.** Where several files have an object, that of the first file in the order of names
/// counts, and the next one steps in when it goes. Within a file the first one counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Set {
    files: BTreeMap<Arc<str>, File>,
    /// The files that have an object, for every object.
    places: BTreeMap<ObjectKey, BTreeSet<Arc<str>>>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct File {
    objects: BTreeMap<ObjectKey, (Object, Location)>,
    unreadable: BTreeSet<ObjectKey>,
}

/// A change of a set.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The object is new or different.
    Applied(Object),
    /// There is no such object any more.
    Deleted(ObjectKey),
}

/// What reading a file changed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reloaded {
    /// The changes, objects that are new or different first.
    pub changes: Vec<Change>,
    /// What is wrong with the file.
    pub problems: Vec<Problem>,
    /// Objects that are kept in their earlier state, because their present one cannot be read.
    pub kept: Vec<ObjectKey>,
    /// Objects that the file has in a form that cannot be taken, whatever is known of them from before.
    pub unreadable: Vec<ObjectKey>,
    /// Some part of the file cannot be said to be any particular object.
    pub unidentified: bool,
}

impl Set {
    /// The objects of several texts, and all that is wrong with them.
    pub fn from_parsed(texts: impl IntoIterator<Item = Parsed>) -> (Set, Vec<Problem>) {
        let mut set = Set::default();
        let problems = texts.into_iter().flat_map(|parsed| set.take(parsed).problems).collect();
        (set, problems)
    }

    /// Reads a file anew, and keeps the last good state of what cannot be read (see [`Set`]). `text` may be any bytes.
    pub fn reload(&mut self, file: &str, text: impl AsRef<[u8]>) -> Reloaded {
        self.take(parse(file, text))
    }

    /// Takes what a file holds now in place of what it held before.
    fn take(&mut self, parsed: Parsed) -> Reloaded {
        let Parsed { file, objects, mut problems, unreadable, unidentified } = parsed;
        let file: Arc<str> = file.into();
        let old = self.files.get(&file).cloned().unwrap_or_default();
        let mut new = File { unreadable: unreadable.iter().cloned().collect(), ..File::default() };
        for (object, location) in objects {
            new.objects.insert(object.key(), (object, location));
        }
        let mut kept = Vec::new();
        for (key, earlier) in &old.objects {
            if !new.objects.contains_key(key) && (unidentified || new.unreadable.contains(key)) {
                new.objects.insert(key.clone(), earlier.clone());
                kept.push(key.clone());
            }
        }
        let keys: BTreeSet<ObjectKey> = old.objects.keys().chain(new.objects.keys()).cloned().collect();
        let changes = self.changing(keys, |set| set.put(&file, new));
        problems.extend(self.duplicates(&file));
        Reloaded { changes, problems, kept, unreadable, unidentified }
    }

    /// Forgets a file that is no more, with its objects.
    pub fn forget(&mut self, file: &str) -> Vec<Change> {
        let keys = self.files.get(file).map(|file| file.objects.keys().cloned().collect()).unwrap_or_default();
        self.changing(keys, |set| set.put(&file.into(), File::default()))
    }

    /// Adds an object. If there is one of that key, in this file or another, the problem names both places; in the same file
    /// the one that is there already stays.
    pub fn insert(&mut self, object: Object, location: Location) -> Option<Problem> {
        let key = object.key();
        let file = location.file.clone();
        let objects = &mut self.files.entry(file.clone()).or_default().objects;
        if let Some((_, first)) = objects.get(&key) {
            return Some(duplicate(&key, &location, first));
        }
        objects.insert(key.clone(), (object, location));
        self.places.entry(key.clone()).or_default().insert(file.clone());
        self.duplicates_of(&file, &key)
    }

    /// Removes an object from every file that has it, and returns the one that counted.
    pub fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        let files = self.places.remove(key)?;
        let mut removed = files.iter().filter_map(|file| Some(self.files.get_mut(file)?.objects.remove(key)?.0));
        let first = removed.next();
        removed.for_each(drop);
        self.files.retain(|_, file| !file.objects.is_empty() || !file.unreadable.is_empty());
        first
    }

    /// The object of a key.
    pub fn get(&self, key: &ObjectKey) -> Option<&Object> {
        self.entry(key).map(|(object, _)| object)
    }

    /// Where the object of a key is written.
    pub fn location(&self, key: &ObjectKey) -> Option<&Location> {
        self.entry(key).map(|(_, location)| location)
    }

    /// Every object with its place, in the order of keys.
    pub fn iter(&self) -> impl Iterator<Item = (&Object, &Location)> {
        self.places.keys().filter_map(|key| self.entry(key)).map(|(object, location)| (object, location))
    }

    /// The number of objects.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are no objects.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Objects that some file has in a form that cannot be taken, and that no state is known of. A policy among them may say
    /// more than nothing: whoever enforces policies must not go on as if it were not there.
    pub fn unreadable(&self) -> impl Iterator<Item = &ObjectKey> {
        let keys: BTreeSet<_> = self.files.values().flat_map(|file| &file.unreadable).collect();
        keys.into_iter().filter(|key| !self.places.contains_key(key))
    }

    /// What leads from this set to a newer one, objects that are new or different first.
    pub fn diff(&self, newer: &Set) -> Vec<Change> {
        let keys = self.places.keys().chain(newer.places.keys()).collect::<BTreeSet<_>>();
        changes(keys.into_iter().map(|key| (key, self.get(key), newer.get(key))))
    }

    fn entry(&self, key: &ObjectKey) -> Option<&(Object, Location)> {
        let file = self.places.get(key)?.first()?;
        self.files.get(file)?.objects.get(key)
    }

    /// Does something that concerns the objects of some keys, and says what it changed.
    fn changing(&mut self, keys: BTreeSet<ObjectKey>, change: impl FnOnce(&mut Set)) -> Vec<Change> {
        let before: BTreeMap<ObjectKey, Option<Object>> =
            keys.into_iter().map(|key| (key.clone(), self.get(&key).cloned())).collect();
        change(self);
        changes(before.iter().map(|(key, before)| (key, before.as_ref(), self.get(key))))
    }

    /// Puts a file in the place of its earlier self.
    fn put(&mut self, file: &Arc<str>, new: File) {
        for key in self.files.remove(file).iter().flat_map(|old| old.objects.keys()) {
            if let Some(files) = self.places.get_mut(key) {
                files.remove(file);
                if files.is_empty() {
                    self.places.remove(key);
                }
            }
        }
        for key in new.objects.keys() {
            self.places.entry(key.clone()).or_default().insert(file.clone());
        }
        if !new.objects.is_empty() || !new.unreadable.is_empty() {
            self.files.insert(file.clone(), new);
        }
    }

    /// The objects of a file that others have as well.
    fn duplicates(&self, file: &Arc<str>) -> Vec<Problem> {
        let keys = self.files.get(file).into_iter().flat_map(|file| file.objects.keys());
        keys.filter_map(|key| self.duplicates_of(file, key)).collect()
    }

    fn duplicates_of(&self, file: &Arc<str>, key: &ObjectKey) -> Option<Problem> {
        let other = self.places.get(key)?.iter().find(|other| *other != file)?;
        let here = &self.files.get(file)?.objects.get(key)?.1;
        let there = &self.files.get(other)?.objects.get(key)?.1;
        // One of the two places is the first: `other` is, unless `file` itself is.
        Some(if file < other { duplicate(key, there, here) } else { duplicate(key, here, there) })
    }
}

fn changes<'a>(states: impl Iterator<Item = (&'a ObjectKey, Option<&'a Object>, Option<&'a Object>)>) -> Vec<Change> {
    let (mut applied, mut deleted) = (Vec::new(), Vec::new());
    for (key, before, after) in states {
        match (before, after) {
            (Some(_), None) => deleted.push(Change::Deleted(key.clone())),
            (before, Some(after)) if before != Some(after) => applied.push(Change::Applied(after.clone())),
            _ => {}
        }
    }
    applied.append(&mut deleted);
    applied
}

fn duplicate(key: &ObjectKey, location: &Location, first: &Location) -> Problem {
    Problem {
        location: location.clone(),
        severity: Severity::Error,
        object: Some(key.to_string()),
        field: None,
        message: format!("the object is there twice, also at {first}, which counts"),
        remedy: "remove one or rename it".to_owned(),
    }
}
