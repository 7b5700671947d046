//! The short verbs: one request to the box, one answer.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use linux::sandbox;
use serde::Deserialize;
use serde_json::Value;

use crate::conversation::Request;
use crate::server::request;

/// How everything is: nodes, processes, pods, Services. Process ids are those that the caller sees.
pub fn status(state: &Path) -> anyhow::Result<Value> {
    let (mut status, handles) = request(state, &Request::Status)?;
    give_process_ids(&mut status, &handles);
    Ok(status)
}

/// What became of a manifest, a sentence each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Outcome {
    /// What was applied or deleted.
    pub done: Vec<String>,
    /// What is probably a mistake in it.
    pub notes: Vec<String>,
    /// What was not taken, and what to do about it.
    pub refused: Vec<String>,
}

/// Takes the objects of a manifest file (`-` is standard input), as `kubectl apply` would.
pub fn apply(state: &Path, file: &Path) -> anyhow::Result<Outcome> {
    let (file, text) = read(file)?;
    Ok(serde_json::from_value(request(state, &Request::Apply { file, text })?.0)?)
}

/// Removes the objects of a manifest file, as `kubectl delete` would.
pub fn delete(state: &Path, file: &Path) -> anyhow::Result<Outcome> {
    let (file, text) = read(file)?;
    Ok(serde_json::from_value(request(state, &Request::Delete { file, text })?.0)?)
}

/// Kills a process of the product, such as `node-a` (its proxy), `agent@node-a` or `control`, and waits for its end. The box
/// starts it again, unless it is to be held down. The answer has a `sentence` and the `pid` of the new process, if there is
/// one already.
pub fn kill(state: &Path, process: &str, hold: bool) -> anyhow::Result<Value> {
    about_process(state, &Request::Kill { process: process.to_owned(), hold })
}

/// Starts a process that is held down, or whose restart is waited for. The answer is as that of [`kill`].
pub fn resume(state: &Path, process: &str) -> anyhow::Result<Value> {
    about_process(state, &Request::Resume { process: process.to_owned() })
}

/// Starts a new process, of another binary if one is named, waits until it is ready and has the old one told to end. The
/// answer is as that of [`kill`].
pub fn upgrade(state: &Path, process: &str, binary: Option<&Path>) -> anyhow::Result<Value> {
    let find = |path: &Path| fs::canonicalize(path).with_context(|| format!("there is no {}", path.display()));
    let binary = binary.map(find).transpose()?;
    about_process(state, &Request::Upgrade { process: process.to_owned(), binary })
}

fn about_process(state: &Path, asked: &Request) -> anyhow::Result<Value> {
    let (mut answer, handles) = request(state, asked)?;
    give_process_ids(&mut answer, &handles);
    Ok(answer)
}

/// A page of a process' admin socket, such as `/metrics` of `node-a`.
pub fn admin(state: &Path, process: &str, path: &str) -> anyhow::Result<String> {
    let (process, path) = (process.to_owned(), path.to_owned());
    match request(state, &Request::Admin { process, path })?.0 {
        Value::String(page) => Ok(page),
        other => Ok(other.to_string()),
    }
}

fn read(file: &Path) -> anyhow::Result<(String, String)> {
    let name = file.display().to_string();
    let mut text = String::new();
    let limit = manifests::MAX_FILE_BYTES as u64 + 1;
    let read = if name == "-" {
        std::io::stdin().take(limit).read_to_string(&mut text)
    } else {
        fs::File::open(file).and_then(|open| open.take(limit).read_to_string(&mut text))
    };
    read.with_context(|| format!("cannot read {name}"))?;
    Ok((if name == "-" { "standard input".to_owned() } else { name }, text))
}

/// Puts process ids in the place of handles: `"handle": 3` becomes `"pid": 4711`, or `null` for one that
/// has ended. The box cannot do this, as it does not know the numbers outside.
fn give_process_ids(value: &mut Value, handles: &[OwnedFd]) {
    match value {
        Value::Array(all) => all.iter_mut().for_each(|one| give_process_ids(one, handles)),
        Value::Object(fields) => {
            if let Some(index) = fields.remove("handle") {
                let handle = index.as_u64().and_then(|index| handles.get(index as usize));
                let pid = handle.and_then(|handle| sandbox::process_id(handle.as_fd()));
                fields.insert("pid".to_owned(), pid.into());
            }
            fields.values_mut().for_each(|one| give_process_ids(one, handles));
        }
        _ => {}
    }
}
