//! What agents report: which pods their node has captured, and which it cannot.

use tokio::sync::{mpsc, oneshot};
use wire::report;
use wire::server::{CaptureStream, Refused};

use crate::ca::token::{Caller, Role};
use crate::control::{Event, Report};

/// Pods that a node may report. kubelet's own limit is 110 unless somebody raises it; nobody runs thousands.
const MAX_PODS: usize = 4096;

/// Takes an agent's reports, each the whole truth of its node, and confirms each once peers can know.
///
/// That the reports end says nothing about the pods: an agent that restarts has captured what its predecessor had.
pub(crate) async fn serve(
    events: &mpsc::Sender<Event>,
    caller: Caller,
    mut reports: CaptureStream,
) -> Result<(), Refused> {
    if caller.role != Role::Agent {
        let message = format!(
            "captures are reported by agents, and this token is of the {} of {}",
            caller.role.as_str(),
            caller.node
        );
        return Err(Refused::NotAllowed(message));
    }
    while let Some(report) = reports.next().await {
        take(events, &caller.node, report).await?;
        reports.confirm().await;
    }
    Ok(())
}

async fn take(events: &mpsc::Sender<Event>, node: &str, report: report::Report) -> Result<(), Refused> {
    let report::Report { captured: pods, failed } = report;
    if pods.len() > MAX_PODS {
        return Err(Refused::BadRequest(format!(
            "a node reports at most {MAX_PODS} captured pods, and this one {}",
            pods.len()
        )));
    }
    let ending = || Refused::Unavailable("the control plane is ending".to_owned());
    let (published, known) = oneshot::channel();
    let report = Report { node: node.to_owned(), pods, failed, published };
    events.send(Event::Captured(report)).await.map_err(|_| ending())?;
    known.await.map_err(|_| ending())
}
