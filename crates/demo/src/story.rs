//! The story that `justmtls demo` tells: each step does something, measures it, and holds it against what it should show.
//!
//! Nothing here is said because it should be so. A step that does not show what it should ends the story, with its name.

mod faults;
mod scene;
mod steps;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Map, Value, json};

pub(crate) use faults::LEAF_LIFE;
pub(crate) use scene::Scene;

/// How the story is told.
#[derive(Clone, Copy, Debug)]
pub struct Story {
    /// Whether the box ends with it.
    pub once: bool,
    /// One JSON object for each step, instead of text.
    pub json: bool,
}

/// How long a step may take: one that hangs ends the story like one that shows something else.
const STEP: Duration = Duration::from_secs(30);

/// What a step finds out.
#[derive(Debug)]
struct Facts {
    /// Whether people read along.
    told: bool,
    values: Map<String, Value>,
}

impl Facts {
    /// A line for people, at once, and the same as a value for programs.
    fn say(&mut self, name: &str, value: impl Into<Value>, line: impl AsRef<str>) {
        self.hint(line);
        self.values.insert(name.to_owned(), value.into());
    }

    /// A line that only people need.
    fn hint(&mut self, line: impl AsRef<str>) {
        if self.told {
            anstream::println!("   {}", line.as_ref());
        }
    }
}

const DONE: anstyle::Style = anstyle::AnsiColor::Green.on_default().bold();
const FAILED: anstyle::Style = anstyle::AnsiColor::Red.on_default().bold();
const TITLE: anstyle::Style = anstyle::Style::new().bold();

/// Writes what happens as it happens.
struct Narrator {
    story: Story,
    number: usize,
}

impl Narrator {
    fn begin(&mut self, title: &str) -> Facts {
        self.number += 1;
        let told = !self.story.json;
        if told {
            anstream::println!("\n{TITLE}{}. {title}{TITLE:#}", self.number);
        }
        Facts { told, values: Map::new() }
    }

    /// Names a step that says nothing about this cluster.
    fn skip(&self, name: &str) {
        const WHY: &str = "it is about the built-in shop";
        if self.story.json {
            anstream::println!("{}", json!({ "step": name, "skipped": WHY }));
        } else {
            anstream::println!("   step {name} skipped: {WHY}");
        }
    }

    fn end(&self, name: &str, started: Instant, facts: &Facts, failure: Option<&anyhow::Error>) {
        let milliseconds = started.elapsed().as_millis() as u64;
        let sentence = failure.map(|error| format!("{error:#}"));
        if self.story.json {
            let step = json!({ "step": name, "ok": failure.is_none(), "ms": milliseconds, "facts": facts.values, "error": sentence });
            anstream::println!("{step}");
            return;
        }
        match sentence {
            None => anstream::println!("   {DONE}✓{DONE:#} shown, in {milliseconds} ms"),
            Some(sentence) => anstream::println!("   {FAILED}✗ {sentence}{FAILED:#}"),
        }
    }
}

/// Tells the story of the built-in shop, or what can be told of a cluster of the user's own. Returns whether every step
/// showed what it should.
pub(crate) async fn tell(story: Story, scene: Scene) -> bool {
    let mut narrator = Narrator { story, number: 0 };
    let told = if scene.is_built_in() { shop(&mut narrator, &scene).await } else { own(&mut narrator, &scene).await };
    if !story.json {
        match &told {
            Ok(()) if story.once => anstream::println!("\n{DONE}Every step showed what it should.{DONE:#}"),
            Ok(()) => farewell(&scene),
            Err(error) => anstream::println!("\n{FAILED}The story ends here: {error:#}{FAILED:#}"),
        }
    }
    told.is_ok()
}

/// Runs one step of the story and says how it went.
macro_rules! step {
    ($narrator:expr, $name:literal, $title:literal, $facts:ident => $work:expr) => {{
        let mut $facts = $narrator.begin($title);
        let started = Instant::now();
        let result = match tokio::time::timeout(STEP, $work).await {
            Ok(result) => result,
            Err(_) => Err(anyhow::anyhow!("this was not done within {} seconds", STEP.as_secs())),
        };
        $narrator.end($name, started, &$facts, result.as_ref().err());
        result.context(concat!("step ", $name))?
    }};
}

async fn shop(narrator: &mut Narrator, scene: &Scene) -> anyhow::Result<()> {
    step!(narrator, "box", "A cluster in a box", facts => steps::the_box(scene, &mut facts));
    let kept = step!(narrator, "before", "Before: pods talk, and a wiretap between the nodes listens",
        facts => steps::before(scene, &mut facts));
    step!(narrator, "capture", "Capture: the pods join the mesh while they run",
        facts => steps::capture(scene, kept, &mut facts));
    step!(narrator, "after", "After: the same pods, the same wiretap", facts => steps::after(scene, &mut facts));
    step!(narrator, "outsider", "Permissive: a pod outside the mesh still gets through, by name",
        facts => steps::outsider(scene, &mut facts));
    step!(narrator, "strict", "Strict: the pod outside is refused, the others notice nothing",
        facts => steps::strict(scene, &mut facts));
    step!(narrator, "rotation", "Certificates are replaced while pods talk",
        facts => faults::rotation(scene, &mut facts));
    step!(narrator, "control-killed", "The control plane is killed: nobody notices",
        facts => faults::kill(scene, "control", true, &mut facts));
    step!(narrator, "agent-killed", "A node's agent is killed: nobody notices",
        facts => faults::kill(scene, "agent@node-b", true, &mut facts));
    step!(narrator, "proxy-killed", "A proxy is killed: what is open ends by an error, what is new waits for its successor",
        facts => faults::kill(scene, "node-a", false, &mut facts));
    Ok(())
}

async fn own(narrator: &mut Narrator, scene: &Scene) -> anyhow::Result<()> {
    step!(narrator, "box", "Your cluster in a box", facts => steps::the_box(scene, &mut facts));
    step!(narrator, "pods", "Your pods", facts => steps::pods(scene, &mut facts));
    step!(narrator, "wire", "What a wiretap between the nodes sees", facts => steps::wire(scene, &mut facts));
    step!(narrator, "edges", "Who talks to whom, and how", facts => steps::edges(scene, &mut facts));
    ["before", "capture", "after", "outsider", "strict", "rotation", "control-killed", "agent-killed", "proxy-killed"]
        .into_iter()
        .for_each(|name| narrator.skip(name));
    Ok(())
}

fn farewell(scene: &Scene) {
    let state = scene.state_argument();
    let pods: BTreeSet<_> = scene.pod_names().into_iter().take(1).collect();
    let pod = pods.first().map_or("NAMESPACE/POD", String::as_str);
    anstream::println!("\nThe box stays up until Ctrl-C. From another terminal, try:");
    let exec = if scene.is_built_in() {
        format!("demo exec{state} {} -- curl -s http://web/", steps::CLIENT)
    } else {
        format!("demo exec{state} {pod} -- PROGRAM ARGS…")
    };
    for line in [
        format!("demo status{state}"),
        exec,
        format!("demo exec{state} --node node-a -- tcpdump -ni eth0 tcp"),
        format!("demo admin{state} node-a /connections"),
        format!("demo apply{state} -f FILE, and delete{state} -f FILE, with Kubernetes YAML"),
    ] {
        anstream::println!("   justmtls {line}");
    }
    if scene.is_built_in() {
        anstream::println!("Strict is still on. To let {} in again:", steps::OUTSIDER);
        anstream::println!("   echo '{}' | justmtls demo delete{state} -f -", steps::STRICT);
    }
}
