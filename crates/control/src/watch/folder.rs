//! A folder of Kubernetes YAML, by inotify.
//!
//! A file counts from the moment it is closed after writing, or renamed into the folder; a writer that wants no half of it
//! read renames. What cannot be read keeps its last good state, and a folder that is gone keeps everything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use manifests::{Change, MAX_FILE_BYTES, ObjectKey, Reloaded, Set};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Batch, decides};
use crate::problem::{Problem, quoted};

/// A burst of changes is over when nothing has come for this long.
const QUIET: Duration = Duration::from_millis(3);
/// A burst that does not end is taken in parts.
const LONGEST_BURST: Duration = Duration::from_millis(25);
/// How often a folder that is gone is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Files that are read at most; a Kubernetes object has some kilobytes.
const MAX_FILES: usize = 100_000;
/// Objects that are taken at most; the design bound is 250,000 pods.
const MAX_OBJECTS: usize = 500_000;
/// Room for some hundreds of events in one read.
const EVENT_BUFFER: usize = 64 * 1024;

/// A watched folder, and what was last read from it.
pub(crate) struct Folder {
    path: PathBuf,
    /// `None` while the folder is gone.
    events: Option<EventStream<Vec<u8>>>,
    set: Set,
    /// By file, what is wrong with it.
    problems: BTreeMap<String, Vec<Problem>>,
    /// By file, the objects that stay as they were because they cannot be read as they stand there now.
    kept: BTreeMap<String, Vec<ObjectKey>>,
    /// What is wrong with the folder itself.
    own_problem: Option<Problem>,
    /// Whether this is the first reading of all files.
    first: bool,
    /// Files that could not be read wholly at the start, and have not been since: what they hold was never known here.
    unlisted: BTreeSet<String>,
}

/// Why a folder cannot be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot watch the folder of objects {}: {error}; give an existing folder with --objects", path.display())]
    Watch { path: PathBuf, error: io::Error },
    #[error("cannot list the folder of objects {}: {error}; make it readable", path.display())]
    List { path: PathBuf, error: io::Error },
}

/// What a burst of events says about the folder.
#[derive(Debug, Default)]
struct Burst {
    files: BTreeSet<String>,
    /// Events were lost: any file may have changed.
    overflow: bool,
    /// The folder was removed, renamed or replaced.
    gone: bool,
}

impl Folder {
    /// Watches a folder and reads all of it.
    pub(crate) fn open(path: &Path) -> Result<(Self, Batch), FolderError> {
        let events = watch(path).map_err(|error| FolderError::Watch { path: path.to_owned(), error })?;
        let mut folder = Self {
            path: path.to_owned(),
            events: Some(events),
            set: Set::default(),
            problems: BTreeMap::new(),
            kept: BTreeMap::new(),
            own_problem: None,
            first: true,
            unlisted: BTreeSet::new(),
        };
        let changes = folder.read_all().map_err(|error| FolderError::List { path: path.to_owned(), error })?;
        folder.first = false;
        let batch = folder.batch(changes);
        Ok((folder, batch))
    }

    /// All objects as they are.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &manifests::Object> {
        self.set.iter().map(|(object, _)| object)
    }

    /// Waits for the next thing to say.
    pub(crate) async fn next(&mut self) -> Batch {
        let Some(events) = &mut self.events else {
            return self.found_again().await;
        };
        let burst = gather(events).await;
        if burst.gone {
            self.events = None;
            self.own_problem = Some(Problem::error(
                self.path.display(),
                "the folder of objects was removed or replaced; the last good state of every object stays until a folder \
                 is there again",
            ));
            return self.batch(Vec::new());
        }
        if burst.overflow {
            let changes = self.reread_all();
            return self.batch(changes);
        }
        let changes = burst.files.iter().flat_map(|file| self.read(file)).collect();
        self.batch(changes)
    }

    /// Waits until there is a folder again. It may be another one: what it does not have is gone.
    async fn found_again(&mut self) -> Batch {
        loop {
            sleep(LOOK_AGAIN).await;
            if let Ok(events) = watch(&self.path) {
                self.events = Some(events);
                self.own_problem = None;
                let changes = self.reread_all();
                return self.batch(changes);
            }
        }
    }

    fn reread_all(&mut self) -> Vec<Change> {
        self.read_all().unwrap_or_else(|error| {
            let message = format!("the folder of objects cannot be listed: {error}; the last good state stays");
            self.own_problem = Some(Problem::error(self.path.display(), message));
            Vec::new()
        })
    }

    fn read_all(&mut self) -> io::Result<Vec<Change>> {
        let mut files = BTreeSet::new();
        for entry in std::fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string()
                && is_manifest(&name)
            {
                files.insert(name);
            }
        }
        let known: Vec<String> = self.problems.keys().cloned().collect();
        files.extend(known);
        Ok(files.iter().flat_map(|file| self.read(file)).collect())
    }

    /// Reads one file anew, or forgets it where it is no more.
    fn read(&mut self, file: &str) -> Vec<Change> {
        let is_new = !self.problems.contains_key(file);
        if is_new && (self.problems.len() >= MAX_FILES || self.set.len() >= MAX_OBJECTS) {
            let message =
                format!("is not read: there are {MAX_FILES} files or {MAX_OBJECTS} objects already; remove some");
            self.own_problem = Some(Problem::error(format!("{}/{}", self.path.display(), quoted(file)), message));
            self.note_listed(file, false);
            return Vec::new();
        }
        match read_file(&self.path.join(file)) {
            Ok(text) => {
                let Reloaded { changes, problems, kept, unreadable, unidentified } = self.set.reload(file, text);
                // For a policy that cannot be read another one stands in, which refuses (D13).
                let missing = unreadable.iter().any(|key| key.kind != manifests::Kind::AuthorizationPolicy);
                self.note_listed(file, !unidentified && !missing);
                let still_there = kept.iter().filter(|key| unreadable.contains(key)).cloned().collect();
                self.kept.insert(file.to_owned(), still_there);
                let kept = kept.iter().map(|key| {
                    Problem::warning(
                        file,
                        format!("{key} cannot be read as it stands here now, and its last good state stays"),
                    )
                });
                let problems = problems.iter().map(from_manifest).chain(kept).collect();
                self.problems.insert(file.to_owned(), problems);
                changes
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.problems.remove(file);
                self.kept.remove(file);
                self.unlisted.remove(file);
                self.set.forget(file)
            }
            Err(error) => {
                let message = format!("cannot be read: {error}; the last good state of its objects stays");
                self.problems.insert(file.to_owned(), vec![Problem::error(file, message)]);
                self.note_listed(file, false);
                Vec::new()
            }
        }
    }

    /// Takes note of whether all that a file holds is known. After the start there is an earlier state of whatever was
    /// listed, and what is new and cannot be read affects only itself.
    fn note_listed(&mut self, file: &str, wholly: bool) {
        if wholly {
            self.unlisted.remove(file);
        } else if self.first {
            self.unlisted.insert(file.to_owned());
        }
    }

    fn batch(&self, changes: Vec<Change>) -> Batch {
        // An object that went from one file to another is neither deleted nor new: what counts is what there is now.
        let keys: BTreeSet<_> = changes.iter().map(key).collect();
        let (applied, deleted): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| self.set.get(key).is_some());
        // Of one that only audited no state is kept that could decide in its place.
        let audited = self.kept.values().flatten().filter(|key| self.set.get(key).is_some_and(|kept| !decides(kept)));
        let unreadable = self.set.unreadable().chain(audited);
        let applied = applied.iter().filter_map(|key| self.set.get(key)).cloned().map(Change::Applied);
        Batch {
            changes: applied.chain(deleted.into_iter().map(Change::Deleted)).collect(),
            unreadable: unreadable.map(|key| (key.clone(), BTreeMap::new())).collect(),
            unlisted: self.unlisted.clone(),
            problems: self.own_problem.iter().chain(self.problems.values().flatten()).cloned().collect(),
            ..Batch::default()
        }
    }
}

fn key(change: &Change) -> ObjectKey {
    match change {
        Change::Applied(object) => object.key(),
        Change::Deleted(key) => key.clone(),
    }
}

fn watch(path: &Path) -> io::Result<EventStream<Vec<u8>>> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    inotify.watches().add(path, mask)?;
    inotify.into_event_stream(vec![0; EVENT_BUFFER])
}

/// Waits for an event, and for those that come with it.
async fn gather(events: &mut EventStream<Vec<u8>>) -> Burst {
    let mut burst = Burst::default();
    let Some(first) = events.next().await else {
        burst.gone = true;
        return burst;
    };
    burst.take(first);
    let end = Instant::now() + LONGEST_BURST;
    loop {
        let quiet = end.min(Instant::now() + QUIET);
        match timeout_at(quiet, pin!(events.next())).await {
            Ok(Some(event)) => burst.take(event),
            Ok(None) | Err(_) => return burst,
        }
    }
}

impl Burst {
    fn take(&mut self, event: io::Result<inotify::EventOwned>) {
        let Ok(event) = event else {
            self.overflow = true;
            return;
        };
        let own = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED;
        self.gone |= event.mask.intersects(own);
        self.overflow |= event.mask.contains(EventMask::Q_OVERFLOW);
        let name = event.name.and_then(|name| name.into_string().ok());
        self.files.extend(name.filter(|name| is_manifest(name)));
    }
}

/// Hidden files are what writers keep before they rename.
fn is_manifest(name: &str) -> bool {
    !name.starts_with('.') && [".yaml", ".yml", ".json"].iter().any(|suffix| name.ends_with(suffix))
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a FIFO would wait for its writer for ever.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut text = Vec::new();
    // One byte more than is allowed shows that a file is too large; what that means is said where it is parsed.
    File::open(path)?.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut text)?;
    Ok(text)
}

fn from_manifest(problem: &manifests::Problem) -> Problem {
    let object = problem.object.as_ref().map(|object| format!("{object}: ")).unwrap_or_default();
    let message = object + &problem.finding();
    match problem.severity {
        manifests::Severity::Error => Problem::error(&problem.location, message),
        manifests::Severity::Warning => Problem::warning(&problem.location, message),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use manifests::Kind;
    use tempfile::TempDir;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn service(name: &str, port: u32) -> String {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{ports: [{{port: {port}}}]}}\n"
        )
    }

    /// Batches until one satisfies, which must come soon.
    async fn until(folder: &mut Folder, holds: impl Fn(&Batch) -> bool) -> Batch {
        let end = Instant::now() + LONG;
        loop {
            let batch = timeout_at(end, folder.next()).await.expect("nothing came");
            if holds(&batch) {
                return batch;
            }
        }
    }

    fn names(changes: &[Change]) -> Vec<String> {
        let name = |change: &Change| match change {
            Change::Applied(object) => format!("+{}", object.key().name),
            Change::Deleted(key) => format!("-{}", key.name),
        };
        changes.iter().map(name).collect()
    }

    #[tokio::test]
    async fn what_is_there_comes_first_and_then_every_change() {
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("a.yaml"), service("one", 80) + &service("two", 80)).unwrap();
        fs::write(directory.path().join("notes.txt"), "not a manifest").unwrap();
        fs::write(directory.path().join(".b.yaml"), service("hidden", 80)).unwrap();
        let (mut folder, first) = Folder::open(directory.path()).unwrap();
        assert_eq!(names(&first.changes), ["+one", "+two"]);
        assert_eq!(folder.objects().count(), 2);

        fs::rename(directory.path().join(".b.yaml"), directory.path().join("b.yaml")).unwrap();
        assert_eq!(names(&until(&mut folder, |batch| !batch.changes.is_empty()).await.changes), ["+hidden"]);
        fs::write(directory.path().join("a.yaml"), service("one", 81)).unwrap();
        let changed = until(&mut folder, |batch| names(&batch.changes).contains(&"-two".to_owned())).await;
        assert_eq!(names(&changed.changes), ["+one", "-two"]);
        fs::remove_file(directory.path().join("b.yaml")).unwrap();
        assert_eq!(names(&until(&mut folder, |batch| !batch.changes.is_empty()).await.changes), ["-hidden"]);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_keeps_its_objects_and_hides_no_other_file() {
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("a.yaml"), service("one", 80)).unwrap();
        let (mut folder, _) = Folder::open(directory.path()).unwrap();
        fs::write(directory.path().join(".new"), service("one", 70000)).unwrap();
        fs::rename(directory.path().join(".new"), directory.path().join("a.yaml")).unwrap();
        let batch = until(&mut folder, |batch| !batch.problems.is_empty()).await;
        assert!(batch.changes.is_empty() && batch.unreadable.is_empty());
        let problems: Vec<_> = batch.problems.iter().map(ToString::to_string).collect();
        assert!(
            problems.iter().any(|problem| problem.starts_with("a.yaml") && problem.contains("70000")),
            "{problems:?}"
        );
        assert!(problems.iter().any(|problem| problem.contains("last good state stays")), "{problems:?}");

        fs::write(directory.path().join("b.yaml"), service("two", 80)).unwrap();
        assert_eq!(names(&until(&mut folder, |batch| !batch.changes.is_empty()).await.changes), ["+two"]);
        fs::write(directory.path().join("a.yaml"), service("one", 81)).unwrap();
        assert!(until(&mut folder, |batch| names(&batch.changes) == ["+one"]).await.problems.is_empty());
    }

    #[tokio::test]
    async fn a_policy_that_was_never_readable_is_listed_as_such() {
        let directory = TempDir::new().unwrap();
        let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: shop, name: p}\n\
                    spec: {action: MAYBE}\n";
        fs::write(directory.path().join("p.yaml"), text).unwrap();
        let (_, first) = Folder::open(directory.path()).unwrap();
        let keys: Vec<_> = first.unreadable.keys().map(|key| (key.kind, key.name.as_str())).collect();
        assert_eq!(keys, [(Kind::AuthorizationPolicy, "p")]);
    }

    #[tokio::test]
    async fn what_comes_of_a_policy_that_audited_and_cannot_be_read_is_listed_as_never_readable() {
        let directory = TempDir::new().unwrap();
        let policy = |spec: &str| {
            let head =
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: shop, name: p}\n";
            fs::write(directory.path().join("p.yaml"), format!("{head}spec: {spec}\n")).unwrap();
        };
        policy("{action: AUDIT, rules: [{}]}");
        let (mut folder, first) = Folder::open(directory.path()).unwrap();
        assert!(first.unreadable.is_empty());
        policy("{action: DENY, rules: [{someday: []}]}");
        until(&mut folder, |batch| batch.unreadable.len() == 1).await;
        policy("{action: DENY, rules: [{}]}");
        until(&mut folder, |batch| batch.unreadable.is_empty()).await;
        policy("{action: DENY, rules: [{someday: []}]}");
        let kept = until(&mut folder, |batch| !batch.problems.is_empty()).await;
        assert!(kept.unreadable.is_empty(), "the last good state stays");
    }

    #[tokio::test]
    async fn a_folder_that_is_gone_keeps_everything_and_its_successor_counts() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("objects");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), service("one", 80) + &service("two", 80)).unwrap();
        let (mut folder, _) = Folder::open(&path).unwrap();
        fs::rename(&path, directory.path().join("old")).unwrap();
        let gone = until(&mut folder, |batch| !batch.problems.is_empty()).await;
        assert!(gone.changes.is_empty());
        assert!(gone.problems[0].message.contains("removed or replaced"));

        let next = directory.path().join("next");
        fs::create_dir(&next).unwrap();
        fs::write(next.join("b.yaml"), service("two", 80)).unwrap();
        fs::rename(&next, &path).unwrap();
        let back = until(&mut folder, |batch| batch.problems.is_empty()).await;
        // `two` went to another file: it is as it was, and not gone in between.
        assert_eq!(names(&back.changes), ["+two", "-one"]);
        fs::write(path.join("c.yaml"), service("three", 80)).unwrap();
        assert_eq!(names(&until(&mut folder, |batch| !batch.changes.is_empty()).await.changes), ["+three"]);
    }

    #[tokio::test]
    async fn what_is_not_a_folder_or_not_a_file_is_named() {
        let directory = TempDir::new().unwrap();
        let error = Folder::open(&directory.path().join("missing")).err().unwrap().to_string();
        assert!(error.contains("missing") && error.contains("--objects"), "{error}");
        fs::create_dir(directory.path().join("a.yaml")).unwrap();
        let (_, first) = Folder::open(directory.path()).unwrap();
        assert!(first.problems[0].to_string().contains("not a regular file"));
    }
}
