//! The objects as text: plain YAML, and the chart.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use crate::objects::{self, Object};
use crate::source::{Expression, Source};
use crate::values::{self, Key, VERSION, Values};

/// What every file that we print begins with.
const HEAD: &str = "# Made by `justmtls render`, from the same source as `justmtls install`.\n";

/// All objects, the definitions of Istio's kinds among them, as YAML documents in the order in which they are made.
///
/// # Errors
/// A value that has no form in YAML, of which there is none.
pub(crate) fn yaml(values: &Values) -> anyhow::Result<String> {
    let mut text = HEAD.to_owned();
    for object in objects::definitions().iter().chain(&objects::objects(values)) {
        text.push_str("---\n");
        text.push_str(&document(&object.value)?);
    }
    Ok(text)
}

fn document(value: &Value) -> anyhow::Result<String> {
    let mut text = serde_saphyr::to_string(value)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// The chart's files: names and contents.
///
/// # Errors
/// As for [`yaml`].
pub(crate) fn chart(values: &Values) -> anyhow::Result<Vec<(String, String)>> {
    let mut files = vec![
        ("Chart.yaml".to_owned(), description()),
        ("values.yaml".to_owned(), documented(values)?),
        ("values.schema.json".to_owned(), format!("{:#}\n", values::schema())),
    ];
    for definition in objects::definitions() {
        let name = definition.name().split('.').next().unwrap_or_default().to_owned();
        files.push((format!("crds/{name}.yaml"), format!("{HEAD}{}", document(&definition.value)?)));
    }
    for (number, object) in objects::all(Source::Chart).iter().enumerate() {
        let name = format!("templates/{:02}-{}-{}.yaml", number + 1, object.kind().to_lowercase(), object.name());
        files.push((name, template(object)?));
    }
    Ok(files)
}

fn template(object: &Object) -> anyhow::Result<String> {
    let text = Expression::in_place_of_marks(&document(&object.value)?);
    Ok(match object.only_if {
        Some(key) => format!("{HEAD}{{{{- if .Values.{} }}}}\n{text}{{{{- end }}}}\n", key.as_str()),
        None => format!("{HEAD}{text}"),
    })
}

fn description() -> String {
    format!(
        "{HEAD}apiVersion: v2\nname: justmtls\ndescription: Every TCP connection between two pods as mutually authenticated TLS.\n\
         type: application\nversion: {VERSION}\nappVersion: {VERSION}\nkubeVersion: \">={}.0-0\"\n",
        crate::MINIMUM_KUBERNETES
    )
}

/// `values.yaml`: every key with its meaning.
fn documented(values: &Values) -> anyhow::Result<String> {
    let mut text = HEAD.to_owned();
    text.push_str(
        "#\n# A chart cannot look at the nodes: where their directories are others (k3s, GKE, …), name them here.\n#\n",
    );
    for key in Key::ALL {
        text.push_str(&format!("# {}: {}\n", key.as_str(), key.about()));
    }
    text.push_str(&document(&values.nested())?);
    Ok(text)
}

/// Writes the chart. Templates that an earlier version left are taken away.
///
/// # Errors
/// The folder cannot be written, or is something else than a chart of ours.
pub(crate) fn write_chart(values: &Values, folder: &Path) -> anyhow::Result<usize> {
    let place = || folder.display().to_string();
    if folder.join("Chart.yaml").exists() {
        let text = fs::read_to_string(folder.join("Chart.yaml")).with_context(place)?;
        anyhow::ensure!(
            text.starts_with(HEAD),
            "{} holds a chart that is not ours; name another folder",
            folder.display()
        );
        for part in ["templates", "crds"] {
            match fs::remove_dir_all(folder.join(part)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(place),
                _ => {}
            }
        }
    }
    let files = chart(values)?;
    for (name, text) in &files {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(files.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::USED;

    fn other_values() -> Values {
        let words = [
            "image=localhost/justmtls:1",
            "imagePullPolicy=Never",
            "trustDomain=example.org",
            "insideCIDRs=10.0.0.0/8",
            "mixedCIDRs=172.16.0.0/12",
            "serviceCIDRs=10.96.0.0/12,fd00::/108",
            "excludedPorts=22",
            "apiServerAddresses=10.0.0.1,fd00::/64",
            "viewLifetime=1m",
            "wholeMeshUpTo=5000000",
            "leafValidity=1h",
            "drain=5",
            "replicas=3",
            "cni.binDir=/b",
            "cni.confDir=/c",
            "cni.exempt=kube-system,webhooks",
            "cri.socket=/run/x/y.sock",
            "criticalPodsQuota=true",
            "resources.control.cpu=1",
            "resources.control.memory=1Gi",
            "resources.agent.cpu=2",
            "resources.agent.memory=2Gi",
            "resources.proxy.cpu=3",
            "resources.proxy.memory=3Gi",
        ];
        Values::from_words(&words.map(str::to_owned)).unwrap()
    }

    /// What Helm would make of a template, for the few expressions that there are.
    fn evaluate(text: &str, values: &Values) -> Option<Value> {
        let mut text = text.to_owned();
        if let Some(start) = text.find("{{- if .Values.") {
            let end = text[start..].find("}}").unwrap() + start;
            let key = Key::from_name(text[start + "{{- if .Values.".len()..end].trim()).unwrap();
            if values.get(key) != "true" {
                return None;
            }
            text = text.replace(&text[start..end + 2].to_owned(), "").replace("{{- end }}", "");
        }
        for expression in USED {
            let mark = Source::Chart.leaf(*expression);
            let helm = Expression::in_place_of_marks(mark.as_str().unwrap());
            text = text.replace(&helm, &Source::Values(values).leaf(*expression).to_string());
        }
        assert!(!text.contains("{{") && !text.contains("helm-"), "{text}");
        Some(serde_saphyr::from_str(&text).unwrap())
    }

    #[test]
    fn the_chart_and_render_say_the_same_objects_for_default_and_other_values() {
        for values in [Values::default(), other_values()] {
            let files = chart(&values).unwrap();
            let templates = files.iter().filter(|(name, _)| name.starts_with("templates/"));
            let made: Vec<_> = templates.filter_map(|(_, text)| evaluate(text, &values)).collect();
            let expected: Vec<_> = objects::objects(&values).into_iter().map(|object| object.value).collect();
            assert_eq!(made, expected);
        }
    }

    #[test]
    fn each_key_changes_some_object() {
        let all = |values: &Values| objects::objects(values);
        let (default, other) = (Values::default(), other_values());
        for key in Key::ALL {
            let mut values = default.clone();
            values.set(*key, other.get(*key)).unwrap();
            assert_ne!(all(&values), all(&default), "{} changes nothing", key.as_str());
        }
    }

    #[test]
    fn what_is_printed_is_what_is_applied() {
        let text = yaml(&other_values()).unwrap();
        let printed: Vec<Value> =
            text.split("---\n").skip(1).map(|document| serde_saphyr::from_str(document).unwrap()).collect();
        let expected: Vec<_> = objects::definitions().into_iter().chain(objects::objects(&other_values())).collect();
        assert_eq!(printed, expected.into_iter().map(|object| object.value).collect::<Vec<_>>());
        assert_eq!(text, yaml(&other_values()).unwrap());
    }

    #[test]
    fn values_yaml_is_read_back_as_the_values() {
        let files = chart(&other_values()).unwrap();
        let (_, text) = files.iter().find(|(name, _)| name == "values.yaml").unwrap();
        assert_eq!(serde_saphyr::from_str::<Value>(text).unwrap(), other_values().nested());
        for key in Key::ALL {
            assert!(text.contains(&format!("# {}: ", key.as_str())));
        }
    }

    #[test]
    fn the_chart_of_the_repository_is_up_to_date() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/chart");
        let expected = chart(&Values::default()).unwrap();
        for (name, text) in &expected {
            let there = fs::read_to_string(folder.join(name)).unwrap_or_default();
            assert!(there == *text, "deploy/chart/{name} differs: run `justmtls render --chart deploy/chart`");
        }
        let there: usize =
            ["templates", "crds"].iter().map(|part| fs::read_dir(folder.join(part)).unwrap().count()).sum();
        assert_eq!(
            there + 3,
            expected.len(),
            "deploy/chart has files too many: run `justmtls render --chart deploy/chart`"
        );
    }

    #[test]
    fn a_folder_with_another_chart_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("Chart.yaml"), "name: other\n").unwrap();
        assert!(write_chart(&Values::default(), folder.path()).unwrap_err().to_string().contains("not ours"));
        fs::remove_file(folder.path().join("Chart.yaml")).unwrap();
        let written = write_chart(&Values::default(), folder.path()).unwrap();
        fs::write(folder.path().join("templates/old.yaml"), "").unwrap();
        assert_eq!(write_chart(&Values::default(), folder.path()).unwrap(), written);
        assert!(!folder.path().join("templates/old.yaml").exists());
    }
}
