//! What may stand before the verb, as kubectl takes it: `justmtls --context staging check`.

use anyhow::bail;

use crate::Verb;
use crate::cluster::Place;

/// Which cluster, and which namespace. Each verb takes these after its name, too, and what stands there counts.
#[derive(clap::Args, Clone, Default, Debug)]
#[command(next_help_heading = "Options of the verbs that talk to a cluster")]
pub struct Before {
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
    /// Pods or edges of this namespace alone.
    #[arg(short, long)]
    pub namespace: Option<String>,
}

impl Before {
    /// Gives it to a verb.
    ///
    /// # Errors
    /// The verb has no use for it.
    pub fn give(self, verb: &mut Verb) -> anyhow::Result<()> {
        let (name, place, namespace) = match verb {
            Verb::Install(arguments) => ("install", Some(&mut arguments.place), None),
            Verb::Upgrade(arguments) => ("upgrade", Some(&mut arguments.place), None),
            Verb::Uninstall(arguments) => ("uninstall", Some(&mut arguments.place), None),
            Verb::Render(_) => ("render", None, None),
            Verb::Check(arguments) => ("check", Some(&mut arguments.place), Some(&mut arguments.namespace)),
            Verb::Status(arguments) => ("status", Some(&mut arguments.place), Some(&mut arguments.namespace)),
            Verb::Coverage(arguments) => ("coverage", Some(&mut arguments.place), Some(&mut arguments.namespace)),
            Verb::Version(arguments) => ("version", Some(&mut arguments.place), None),
        };
        let Some(place) = place else { return self.refuse(name) };
        if let (Some(_), None) = (&self.namespace, &namespace) {
            bail!("--namespace: `{name}` is about the whole cluster, and takes no namespace");
        }
        place.kubeconfig = place.kubeconfig.take().or(self.place.kubeconfig);
        place.context = place.context.take().or(self.place.context);
        if let Some(namespace) = namespace {
            *namespace = namespace.take().or(self.namespace);
        }
        Ok(())
    }

    /// For what talks to no cluster.
    ///
    /// # Errors
    /// Something was said.
    pub fn refuse(&self, name: &str) -> anyhow::Result<()> {
        let said = [
            ("--kubeconfig", self.place.kubeconfig.is_some()),
            ("--context", self.place.context.is_some()),
            ("--namespace", self.namespace.is_some()),
        ];
        match said.into_iter().find(|(_, is_said)| *is_said) {
            Some((option, _)) => bail!(
                "{option}: before `{name}` it says nothing; it is for the verbs that talk to a cluster, such as `check`"
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        before: Before,
        #[command(subcommand)]
        verb: Verb,
    }

    fn given(words: &str) -> Result<Verb, String> {
        let line =
            Line::try_parse_from(["x"].into_iter().chain(words.split(' '))).map_err(|error| error.to_string())?;
        let mut verb = line.verb;
        line.before.give(&mut verb).map_err(|error| error.to_string())?;
        Ok(verb)
    }

    #[test]
    fn what_stands_before_a_verb_is_as_if_it_stood_after_it_and_what_stands_there_counts() {
        let Ok(Verb::Check(check)) = given("--context a check") else { panic!("check") };
        assert_eq!((check.place.context.as_deref(), check.namespace), (Some("a"), None));
        let Ok(Verb::Status(status)) = given("--kubeconfig f -n one --context a status --context b") else {
            panic!("status")
        };
        assert_eq!((status.place.context.as_deref(), status.namespace.as_deref()), (Some("b"), Some("one")));
        assert_eq!(status.place.kubeconfig.as_deref(), Some(std::path::Path::new("f")));
        assert!(given("uninstall").is_ok());
    }

    #[test]
    fn a_verb_that_has_no_use_for_it_refuses_it_by_name() {
        assert!(given("-n shop install").unwrap_err().contains("--namespace: `install` is about the whole cluster"));
        assert!(given("--context a render").unwrap_err().contains("--context: before `render` it says nothing"));
        assert!(given("render").is_ok());
        assert!(Before::default().refuse("demo").is_ok());
    }
}
