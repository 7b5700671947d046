//! What is wrong with the cluster's objects, as sentences for whoever starts the box, changes it or looks at it.
//!
//! What was refused at the start is remembered until such an object is taken. Warnings are found anew each time, so that
//! none outlives its cause.

use std::collections::BTreeMap;

use manifests::k8s_openapi::api::core::v1::PodSpec;
use manifests::{Location, Object, ObjectKey, Problem, Set};
use serde_json::{Value, json};

/// Where objects were written, and what was refused.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    /// The objects that somebody wrote; others are the box's own.
    places: BTreeMap<ObjectKey, Location>,
    refused: Vec<Refused>,
    images_said: bool,
}

/// An object, or a text without one, that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// The object as its key displays it, where one could be read.
    pub(crate) object: Option<String>,
    /// Where, what and what to do.
    pub(crate) sentence: String,
}

/// What became of a manifest.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) done: Vec<String>,
    pub(crate) refused: Vec<Refused>,
    /// About what was taken.
    pub(crate) notes: Vec<String>,
}

impl Taken {
    /// What was wrong before anything was taken.
    pub(crate) fn of(problems: Vec<Problem>) -> Taken {
        let mut taken = Taken { done: Vec::new(), refused: Vec::new(), notes: Vec::new() };
        for problem in problems {
            let sentence = problem.to_string();
            if problem.is_error() {
                taken.refused.push(Refused { object: problem.object, sentence });
            } else {
                taken.notes.push(sentence);
            }
        }
        taken
    }

    /// An object was not taken.
    pub(crate) fn refuse(&mut self, key: ObjectKey, sentence: String) {
        self.refused.push(Refused { object: Some(key.to_string()), sentence });
    }

    /// For who asked.
    pub(crate) fn answer(self) -> Value {
        let refused = self.refused.into_iter().map(|one| one.sentence);
        json!({ "done": self.done, "refused": refused.collect::<Vec<_>>(), "notes": self.notes })
    }
}

impl Complaints {
    /// An object was taken as it is written there.
    pub(crate) fn taken(&mut self, key: ObjectKey, place: Location) {
        let name = key.to_string();
        self.refused.retain(|refused| refused.object.as_ref() != Some(&name));
        self.places.insert(key, place);
    }

    /// An object was deleted.
    pub(crate) fn deleted(&mut self, key: &ObjectKey) {
        self.places.remove(key);
    }

    /// Something was refused of which `status` is to know.
    pub(crate) fn remember(&mut self, refused: impl IntoIterator<Item = Refused>) {
        self.refused.extend(refused);
    }

    /// What is probably a mistake in the objects of these keys; in the first ones with images, that images are not read.
    pub(crate) fn about<'a>(&mut self, keys: &[ObjectKey], objects: impl Objects<'a>) -> Vec<String> {
        let among = |name: &str| keys.iter().any(|key| key.to_string() == name);
        let mut sentences: Vec<_> =
            self.warnings(objects.clone()).into_iter().filter(|(name, _)| among(name)).map(|(_, it)| it).collect();
        if !self.images_said {
            let note = self.images(objects.filter(|(key, _)| keys.contains(key)));
            self.images_said = note.is_some();
            sentences.extend(note);
        }
        sentences
    }

    /// Everything, for `status`.
    pub(crate) fn all<'a>(&self, objects: impl Objects<'a>) -> Vec<Value> {
        let refused = self.refused.iter().map(|refused| problem("error", &refused.sentence));
        let warnings = self.warnings(objects.clone()).into_iter().map(|(_, sentence)| problem("warning", &sentence));
        let images = self.images(objects).into_iter().map(|sentence| problem("note", &sentence));
        refused.chain(warnings).chain(images).collect()
    }

    /// What is wrong between objects, each with the name of the one that it is said of.
    fn warnings<'a>(&self, objects: impl Objects<'a>) -> Vec<(String, String)> {
        let mut set = Set::default();
        for (key, object) in objects {
            let place = self.places.get(key).cloned().unwrap_or_else(|| Location::file("the box"));
            // No key is there twice.
            let _ = set.insert(object.clone(), place);
        }
        let written: Vec<_> = self.places.keys().map(ToString::to_string).collect();
        let problems = set.review().into_iter();
        problems
            .filter_map(|problem| Some((problem.object.clone()?, problem.to_string())))
            .filter(|(name, _)| written.contains(name))
            .collect()
    }

    fn images<'a>(&self, mut objects: impl Objects<'a>) -> Option<String> {
        let (key, place) =
            objects.find_map(|(key, object)| has_image(object).then_some((key, self.places.get(key)?)))?;
        Some(format!(
            "{place}: {key}: field image: images are not read here, nor elsewhere in the box; \
             containers run their `command` with the programs of this machine"
        ))
    }
}

/// The cluster's objects.
pub(crate) trait Objects<'a>: Iterator<Item = (&'a ObjectKey, &'a Object)> + Clone {}

impl<'a, T: Iterator<Item = (&'a ObjectKey, &'a Object)> + Clone> Objects<'a> for T {}

/// One sentence as `status` has it.
pub(crate) fn problem(severity: &str, sentence: &str) -> Value {
    json!({ "severity": severity, "sentence": sentence })
}

fn has_image(object: &Object) -> bool {
    let any = |spec: Option<&PodSpec>| spec.iter().flat_map(|spec| &spec.containers).any(|it| it.image.is_some());
    match object {
        Object::Pod(pod) => any(pod.spec.as_ref()),
        Object::Deployment(deployment) => any(deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref())),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n\
         {apiVersion: v1, kind: Service, metadata: {name: lonely, namespace: shop}, spec: {selector: {app: nobody}, ports: [{port: 80}]}}\n---\n\
         {apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {containers: [{name: web, image: nginx}]}}";

    fn taken(complaints: &mut Complaints) -> BTreeMap<ObjectKey, Object> {
        let parsed = manifests::parse("mine.yaml", MANIFEST);
        assert_eq!(parsed.problems, []);
        let take = |(object, place): (Object, Location)| {
            complaints.taken(object.key(), place);
            (object.key(), object)
        };
        parsed.objects.into_iter().map(take).collect()
    }

    #[test]
    fn a_service_without_pods_is_said_with_its_place_until_it_is_gone() {
        let mut complaints = Complaints::default();
        let mut objects = taken(&mut complaints);
        let keys: Vec<_> = objects.keys().cloned().collect();
        let said = complaints.about(&keys, objects.iter());
        assert!(
            said[0].starts_with("mine.yaml:3: Service shop/lonely: field spec.selector: selects no pod"),
            "{said:?}"
        );
        let key = keys.iter().find(|key| key.name == "lonely").unwrap();
        objects.remove(key);
        complaints.deleted(key);
        assert!(!complaints.all(objects.iter()).iter().any(|one| one["severity"] == "warning"));
    }

    #[test]
    fn that_images_are_not_read_is_said_once_and_stays_in_the_status() {
        let mut complaints = Complaints::default();
        let objects = taken(&mut complaints);
        let keys: Vec<_> = objects.keys().cloned().collect();
        let about_images = |said: &[String]| said.iter().filter(|one| one.contains("images are not read")).count();
        assert_eq!(about_images(&complaints.about(&keys, objects.iter())), 1);
        assert_eq!(about_images(&complaints.about(&keys, objects.iter())), 0);
        assert!(complaints.all(objects.iter()).iter().any(|one| one["severity"] == "note"));
    }

    #[test]
    fn what_was_refused_is_remembered_until_such_an_object_is_taken() {
        let mut complaints = Complaints::default();
        let sentence = "mine.yaml:2: Service shop/lonely: field spec.ports[0].port: 70000".to_owned();
        complaints.remember([Refused { object: Some("Service shop/lonely".to_owned()), sentence: sentence.clone() }]);
        let none = BTreeMap::new();
        assert_eq!(complaints.all(none.iter()), [problem("error", &sentence)]);
        taken(&mut complaints);
        assert_eq!(complaints.all(none.iter()), [Value::Null; 0]);
    }
}
