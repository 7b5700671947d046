//! The view while it changes.

use std::net::IpAddr;

use mesh::{PodUid, Resource, ResourceKey, Speaks, Uncaptured, View, Workload};

use crate::world::{ip, pod, service, service_name, serving, uncaptured, view};

fn apply(view: &mut View, workload: Workload) {
    view.apply(Resource::Workload(Box::new(workload)));
}

fn remove(view: &mut View, name: &str) {
    view.remove(&ResourceKey::Workload(pod(name, 0).uid));
}

fn owner(view: &View, address: &str) -> Option<String> {
    view.workload_at(ip(address)).map(|workload| workload.name.to_string())
}

#[test]
fn an_address_that_is_used_again_belongs_to_the_new_pod_in_whatever_order_it_is_said() {
    // The old one goes first, or the new one comes first.
    for new_first in [false, true] {
        let mut view = view([pod("old", 1)], []);
        if new_first {
            apply(&mut view, pod("new", 1));
            remove(&mut view, "old");
        } else {
            remove(&mut view, "old");
            assert_eq!(owner(&view, "10.0.0.1"), None);
            apply(&mut view, pod("new", 1));
        }
        assert_eq!(owner(&view, "10.0.0.1").as_deref(), Some("new"), "new first: {new_first}");
        assert_eq!(owner(&view, "fd00::1").as_deref(), Some("new"));
    }
}

#[test]
fn a_last_word_about_an_old_pod_does_not_take_the_new_ones_address_away() {
    let mut view = view([pod("old", 1), pod("new", 1)], []);
    // Something about the old one changes once more, and then it is gone.
    apply(&mut view, pod("old", 1));
    remove(&mut view, "old");
    assert_eq!(owner(&view, "10.0.0.1").as_deref(), Some("new"));
}

#[test]
fn pods_on_the_hosts_network_share_its_address_until_the_last_one_goes() {
    let on_host = |name| uncaptured(pod(name, 4), Uncaptured::HostNetwork);
    let mut view = view([on_host("a"), on_host("b"), on_host("c")], []);
    for (gone, left) in [("c", Some("b")), ("a", Some("b")), ("b", None)] {
        remove(&mut view, gone);
        assert_eq!(owner(&view, "10.0.0.4").as_deref(), left, "without {gone}");
    }
}

#[test]
fn an_address_that_a_pod_loses_is_nobodys() {
    let mut view = view([pod("web", 1)], []);
    let mut v4_only = pod("web", 1);
    v4_only.addresses.retain(IpAddr::is_ipv4);
    apply(&mut view, v4_only);
    assert_eq!((owner(&view, "10.0.0.1").as_deref(), owner(&view, "fd00::1")), (Some("web"), None));
}

#[test]
fn a_services_address_that_moves_belongs_to_who_has_it() {
    let mut view = view([], [service("old", 1, 80), service("new", 1, 80)]);
    let owner = |view: &View| view.service_at(ip("10.96.0.1")).map(|service| service.name.clone());
    assert_eq!(owner(&view), Some(service_name("new")));
    view.apply(Resource::Service(service("old", 1, 81)));
    view.remove(&ResourceKey::Service(service_name("old")));
    assert_eq!(owner(&view), Some(service_name("new")));
    view.remove(&ResourceKey::Service(service_name("new")));
    assert_eq!(owner(&view), None);
}

#[test]
fn a_pod_that_was_made_again_under_its_name_is_another_one() {
    let mut view = view([pod("web", 1)], []);
    let mut again = uncaptured(pod("web", 2), Uncaptured::Pending);
    again.pod_uid = PodUid::from("web-second");
    apply(&mut view, again);
    assert!(view.workload_of(&PodUid::from("web")).is_none());
    let second = view.workload_of(&PodUid::from("web-second")).unwrap();
    // What the first one's node acknowledged says nothing about the second.
    assert_eq!((second.speaks, second.uncaptured), (Speaks::Nothing, Some(Uncaptured::Pending)));
}

#[test]
fn a_pod_that_was_published_as_captured_never_falls_back_while_it_lives() {
    let mut view = view([pod("web", 1)], []);
    for why in [Uncaptured::Pending, Uncaptured::HostNetwork, Uncaptured::NotAPod] {
        apply(&mut view, uncaptured(serving(pod("web", 1), "web", 80, 80), why));
        let held = view.workload_at(ip("10.0.0.1")).unwrap();
        assert_eq!((held.speaks, held.uncaptured), (Speaks::JustMtls, None), "{why:?}");
        // All else of the change counts.
        assert_eq!(held.endpoints.len(), 1);
    }
}

#[test]
fn a_pod_that_leaves_is_spoken_to_in_clear_until_it_is_captured_again() {
    for why in [Uncaptured::OptedOut, Uncaptured::SystemNamespace] {
        let mut view = view([pod("web", 1)], []);
        for why in [why, Uncaptured::Pending] {
            apply(&mut view, uncaptured(pod("web", 1), why));
            let held = view.workload_at(ip("10.0.0.1")).unwrap();
            assert_eq!((held.speaks, held.uncaptured), (Speaks::Nothing, Some(why)));
        }
        apply(&mut view, pod("web", 1));
        apply(&mut view, uncaptured(pod("web", 1), Uncaptured::Pending));
        assert_eq!(view.workload_at(ip("10.0.0.1")).unwrap().speaks, Speaks::JustMtls);
    }
}

#[test]
fn endpoints_follow_their_pods_and_not_their_service() {
    let mut view = view([serving(pod("a", 1), "web", 80, 80), serving(pod("b", 2), "web", 80, 80)], []);
    let names = |view: &View| {
        view.endpoints_of(&service_name("web")).map(|workload| workload.name.to_string()).collect::<Vec<_>>()
    };
    // Known before the Service is, and in a stable order.
    assert_eq!(names(&view), ["a", "b"]);
    view.apply(Resource::Service(service("web", 1, 80)));
    view.remove(&ResourceKey::Service(service_name("web")));
    assert_eq!(names(&view), ["a", "b"]);
    // Not ready any more: it stops naming the Service.
    apply(&mut view, pod("a", 1));
    assert_eq!(names(&view), ["b"]);
    remove(&mut view, "b");
    assert_eq!(names(&view), Vec::<String>::new());
}

#[test]
fn what_is_not_known_can_be_removed_any_number_of_times() {
    let mut view = view([pod("web", 1)], []);
    for _ in 0..2 {
        remove(&mut view, "nobody");
        view.remove(&ResourceKey::Service(service_name("nothing")));
        view.remove(&ResourceKey::Policy(crate::world::policy_name("shop/none")));
    }
    assert_eq!(view.workloads().count(), 1);
}
