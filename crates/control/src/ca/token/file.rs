//! Tokens of a file: in a cluster in a box it is in the place of Kubernetes' TokenReview.
//!
//! Only the tokens' hashes are kept. A presented token is compared with every one of them in the same time, so that the time
//! of an answer tells nothing about how much of a guess was right.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use super::{Caller, MAX_TOKEN, Role};
use crate::problem::Problem;

/// The largest file: two tokens for each of 10,000 nodes.
const MAX_FILE: u64 = 4 << 20;
/// Fewer than that can be guessed.
const MIN_TOKEN: usize = 16;

/// The tokens of a file, which is read anew when it changes.
pub(crate) struct Tokens {
    path: PathBuf,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    stamp: Option<Stamp>,
    entries: Vec<Entry>,
    problem: Option<Problem>,
}

struct Entry {
    hash: [u8; 32],
    caller: Caller,
}

/// What changes when a file is written or replaced.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    seconds: i64,
    nanoseconds: i64,
}

/// Why a file of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokensError {
    #[error("cannot read the tokens: {0}")]
    Read(#[from] io::Error),
    #[error("the file of tokens is larger than {MAX_FILE} bytes")]
    TooLarge,
    #[error(
        "line {line} of the tokens is not token,role,node with the role agent or proxy and a token of at least \
             {MIN_TOKEN} characters"
    )]
    Line { line: usize },
    #[error("line {line} of the tokens has the same token as line {first}")]
    Duplicate { line: usize, first: usize },
}

impl Tokens {
    /// Reads the tokens for the first time.
    pub(crate) fn open(path: &Path) -> Result<Self, TokensError> {
        let (stamp, entries) = read(path)?;
        let loaded = Mutex::new(Loaded { stamp: Some(stamp), entries, problem: None });
        Ok(Self { path: path.to_owned(), loaded })
    }

    /// Who presents this token; `None` where nobody may.
    pub(crate) fn authenticate(&self, token: &str) -> Option<Caller> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let presented: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let loaded = self.current();
        let mut caller = None;
        for entry in &loaded.entries {
            let difference = entry.hash.iter().zip(presented).fold(0, |difference, (a, b)| difference | (a ^ b));
            if difference == 0 {
                caller = Some(entry.caller.clone());
            }
        }
        caller
    }

    /// What is wrong with the file as it is now, if anything: the tokens before stay.
    pub(crate) fn problem(&self) -> Option<Problem> {
        self.current().problem.clone()
    }

    /// The tokens, read anew if the file is another one than before. A file that cannot be used keeps them as they were.
    fn current(&self) -> MutexGuard<'_, Loaded> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = std::fs::metadata(&self.path).ok().map(|metadata| Stamp::of(&metadata));
        if stamp == loaded.stamp && stamp.is_some() {
            return loaded;
        }
        match read(&self.path) {
            Ok((stamp, entries)) => *loaded = Loaded { stamp: Some(stamp), entries, problem: None },
            Err(error) => {
                let message = format!("{error}; the tokens before stay valid until the file is corrected");
                loaded.stamp = stamp;
                loaded.problem = Some(Problem::error(self.path.display(), message));
            }
        }
        loaded
    }
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            seconds: metadata.mtime(),
            nanoseconds: metadata.mtime_nsec(),
        }
    }
}

fn read(path: &Path) -> Result<(Stamp, Vec<Entry>), TokensError> {
    let file = File::open(path)?;
    let stamp = Stamp::of(&file.metadata()?);
    let mut text = String::new();
    if file.take(MAX_FILE + 1).read_to_string(&mut text)? as u64 > MAX_FILE {
        return Err(TokensError::TooLarge);
    }
    Ok((stamp, parse(&text)?))
}

/// Lines of `token,role,node`; empty ones and those that begin with `#` say nothing.
fn parse(text: &str) -> Result<Vec<Entry>, TokensError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut lines = Vec::new();
    for (line, text) in (1..).zip(text.lines().map(str::trim)) {
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let entry = entry(text).ok_or(TokensError::Line { line })?;
        if let Some(first) = entries.iter().position(|other| other.hash == entry.hash) {
            return Err(TokensError::Duplicate { line, first: lines[first] });
        }
        entries.push(entry);
        lines.push(line);
    }
    Ok(entries)
}

fn entry(line: &str) -> Option<Entry> {
    let mut fields = line.split(',').map(str::trim);
    let (token, role, node) = (fields.next()?, fields.next()?, fields.next()?);
    let role = match role {
        "agent" => Role::Agent,
        "proxy" => Role::Proxy,
        _ => return None,
    };
    let is_whole = fields.next().is_none() && !node.is_empty() && (MIN_TOKEN..=MAX_TOKEN).contains(&token.len());
    is_whole.then(|| Entry {
        hash: Sha256::digest(token.as_bytes()).into(),
        caller: Caller { role, node: node.to_owned() },
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const AGENT: &str = "agent-token-of-node-a";
    const PROXY: &str = "proxy-token-of-node-a";

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn a_token_is_its_callers_and_nobody_elses() {
        let (_directory, path) = file(&format!("# ours\n{AGENT},agent,node-a\n\n{PROXY}, proxy, node-a\n"));
        let tokens = Tokens::open(&path).unwrap();
        assert_eq!(tokens.authenticate(PROXY), Some(Caller { role: Role::Proxy, node: "node-a".to_owned() }));
        assert_eq!(tokens.authenticate(AGENT).unwrap().role, Role::Agent);
        for wrong in ["", "proxy-token-of-node-b", &PROXY[1..], &format!("{PROXY} "), &"x".repeat(100_000)] {
            assert_eq!(tokens.authenticate(wrong), None);
        }
    }

    #[test]
    fn a_file_that_changed_counts_at_the_next_call_and_a_broken_one_does_not() {
        let (directory, path) = file(&format!("{AGENT},agent,node-a\n"));
        let tokens = Tokens::open(&path).unwrap();
        let replace = |text: &str| {
            let next = directory.path().join("next");
            fs::write(&next, text).unwrap();
            fs::rename(next, &path).unwrap();
        };
        replace(&format!("{PROXY},proxy,node-b\n"));
        assert_eq!(tokens.authenticate(AGENT), None);
        assert_eq!(tokens.authenticate(PROXY).unwrap().node, "node-b");
        replace(&format!("{PROXY},master,node-b\n"));
        assert!(tokens.authenticate(PROXY).is_some());
        assert!(tokens.problem().unwrap().to_string().contains("line 1 of the tokens"));
        fs::remove_file(&path).unwrap();
        assert!(tokens.authenticate(PROXY).is_some() && tokens.problem().is_some());
        replace(&format!("{AGENT},agent,node-a\n"));
        assert!(tokens.authenticate(PROXY).is_none() && tokens.problem().is_none());
    }

    #[test]
    fn what_is_wrong_with_a_file_names_the_line_and_never_a_token() {
        for (text, line) in [
            (
                format!("{AGENT},agent,node-a\n{AGENT},proxy,node-b\n"),
                "line 2 of the tokens has the same token as line 1",
            ),
            (format!("{AGENT},agent\n"), "line 1"),
            (format!("{AGENT},agent,node-a,more\n"), "line 1"),
            (format!("{AGENT},agent,\n"), "line 1"),
            ("short,agent,node-a\n".to_owned(), "line 1"),
        ] {
            let (_directory, path) = file(&text);
            let error = Tokens::open(&path).err().unwrap().to_string();
            assert!(error.contains(line), "{error}");
            assert!(!error.contains(AGENT));
        }
    }
}
