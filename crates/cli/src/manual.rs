//! `justmtls completions` and `justmtls man`: what shells and manuals want to know of the command line.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;

/// For `completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArguments {
    /// The shell.
    shell: Shell,
}

/// For `man`.
#[derive(Debug, Args)]
pub(crate) struct ManArguments {
    /// The folder to write into; it is made where it is not there.
    folder: PathBuf,
}

/// Prints the script.
pub(crate) fn completions(arguments: &CompletionsArguments, mut command: Command) -> anyhow::Result<i32> {
    clap_complete::generate(arguments.shell, &mut command, "justmtls", &mut std::io::stdout());
    Ok(0)
}

/// Writes a page for each verb.
pub(crate) fn man(arguments: &ManArguments, command: Command) -> anyhow::Result<i32> {
    let written = pages(&arguments.folder, command)?;
    anstream::println!("{written} pages in {}", arguments.folder.display());
    Ok(0)
}

fn pages(folder: &Path, command: Command) -> anyhow::Result<usize> {
    let place = || folder.display().to_string();
    fs::create_dir_all(folder).with_context(place)?;
    clap_mangen::generate_to(command, folder).with_context(place)?;
    Ok(fs::read_dir(folder).with_context(place)?.count())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::Arguments;

    #[test]
    fn each_verb_has_a_page_and_those_that_are_not_for_people_have_none() {
        let folder = tempfile::tempdir().unwrap();
        let written = pages(&folder.path().join("man"), Arguments::command()).unwrap();
        assert!(written > 10, "{written}");
        assert!(folder.path().join("man/justmtls-install.1").exists());
        assert!(!folder.path().join("man/justmtls-demo-app.1").exists());
    }

    #[test]
    fn completions_know_the_verbs() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "justmtls", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("coverage") && script.contains("uninstall"), "{shell}");
        }
    }
}
