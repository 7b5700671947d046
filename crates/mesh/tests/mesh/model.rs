//! The view against a reference: a list that is searched from its end.

use std::net::IpAddr;
use std::sync::Arc;

use mesh::{PodUid, Resource, ResourceKey, Service, Speaks, Uncaptured, View, Workload};
use proptest::prelude::*;

use crate::world::{pod, service, serving, settings, uncaptured};

/// Everything in the order in which it was said last.
#[derive(Default)]
struct Model {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    published: Vec<PodUid>,
}

impl Model {
    fn apply(&mut self, mut workload: Workload) {
        if let Some(old) = self.take(&workload) {
            self.published.retain(|pod| *pod != old.pod_uid || old.pod_uid == workload.pod_uid);
        }
        if workload.speaks == Speaks::JustMtls {
            self.published.push(workload.pod_uid.clone());
        }
        if [Uncaptured::OptedOut, Uncaptured::SystemNamespace, Uncaptured::NotCapturable]
            .map(Some)
            .contains(&workload.uncaptured)
        {
            self.published.retain(|pod| *pod != workload.pod_uid);
        }
        if self.published.contains(&workload.pod_uid) {
            (workload.speaks, workload.uncaptured) = (Speaks::JustMtls, None);
        }
        self.workloads.push(workload);
    }

    fn remove(&mut self, workload: &Workload) {
        if let Some(old) = self.take(workload) {
            self.published.retain(|pod| *pod != old.pod_uid);
        }
    }

    fn take(&mut self, workload: &Workload) -> Option<Workload> {
        let index = self.workloads.iter().position(|other| other.uid == workload.uid)?;
        Some(self.workloads.remove(index))
    }
}

/// Four names, four addresses, two lives of each name.
#[derive(Clone, Debug)]
struct Step {
    action: u8,
    name: u8,
    number: u8,
    life: u8,
    /// `None`: it is captured.
    uncaptured: Option<Uncaptured>,
    serves: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let why = prop_oneof![
        Just(Uncaptured::Pending),
        Just(Uncaptured::OptedOut),
        Just(Uncaptured::SystemNamespace),
        Just(Uncaptured::NotCapturable),
        Just(Uncaptured::HostNetwork),
        Just(Uncaptured::NotAPod),
    ];
    let uncaptured = prop::option::of(why);
    (0u8..5, 0u8..4, 1u8..5, 0u8..2, uncaptured, any::<bool>()).prop_map(
        |(action, name, number, life, uncaptured, serves)| Step { action, name, number, life, uncaptured, serves },
    )
}

fn workload(step: &Step) -> Workload {
    let mut workload = pod(&format!("pod-{}", step.name), step.number);
    // A UID is of one pod: names do not share them.
    workload.pod_uid = PodUid::from(format!("{}-{}", step.name, step.life).as_str());
    if step.serves {
        workload = serving(workload, "web", 80, 80);
    }
    if let Some(why) = step.uncaptured {
        workload = uncaptured(workload, why);
    }
    workload
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn the_view_and_a_list_agree(steps in prop::collection::vec(step(), 0..60)) {
        let mut view = View::default();
        let mut model = Model::default();
        view.apply(Resource::Settings(settings()));
        for step in steps {
            let workload = workload(&step);
            let service = service(&format!("service-{}", step.name), step.number, 80);
            match step.action {
                0 | 1 => {
                    view.apply(Resource::Workload(Box::new(workload.clone())));
                    model.apply(workload);
                }
                2 => {
                    view.remove(&ResourceKey::Workload(workload.uid.clone()));
                    model.remove(&workload);
                }
                3 => {
                    view.apply(Resource::Service(service.clone()));
                    model.services.retain(|other| other.name != service.name);
                    model.services.push(service);
                }
                _ => {
                    view.remove(&ResourceKey::Service(service.name.clone()));
                    model.services.retain(|other| other.name != service.name);
                }
            }
            agree(&view, &model)?;
        }
    }
}

fn agree(view: &View, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(view.workloads().count(), model.workloads.len());
    prop_assert_eq!(view.services().count(), model.services.len());
    for number in 0..6 {
        let address = IpAddr::from([10, 0, 0, number]);
        let expected = model.workloads.iter().rev().find(|workload| workload.addresses.contains(&address));
        prop_assert_eq!(view.workload_at(address).map(Arc::as_ref), expected);
        let address = IpAddr::from([10, 96, 0, number]);
        let expected = model.services.iter().rev().find(|service| service.addresses.contains(&address));
        prop_assert_eq!(view.service_at(address).map(Arc::as_ref), expected);
    }
    for (name, life) in (0..4).flat_map(|name| [(name, 0), (name, 1)]) {
        let uid = PodUid::from(format!("{name}-{life}").as_str());
        let expected = model.workloads.iter().find(|workload| workload.pod_uid == uid);
        prop_assert_eq!(view.workload_of(&uid).map(Arc::as_ref), expected);
    }
    let name = crate::world::service_name("web");
    let mut expected: Vec<_> = model.workloads.iter().filter(|workload| !workload.endpoints.is_empty()).collect();
    expected.sort_by_key(|workload| &workload.uid);
    prop_assert_eq!(view.endpoints_of(&name).map(Arc::as_ref).collect::<Vec<_>>(), expected);
    Ok(())
}
