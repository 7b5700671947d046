//! An agent's report, as the control plane sees it.

use std::collections::BTreeSet;

use mesh::PodUid;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::proto::v1::{CaptureConfirmed, CaptureReport};

/// One agent's reports of what its node has captured.
pub struct CaptureStream {
    reports: Streaming<CaptureReport>,
    confirmations: mpsc::Sender<Result<CaptureConfirmed, Status>>,
    unconfirmed: Option<u64>,
}

impl CaptureStream {
    pub(super) fn new(
        reports: Streaming<CaptureReport>,
        confirmations: mpsc::Sender<Result<CaptureConfirmed, Status>>,
    ) -> Self {
        Self { reports, confirmations, unconfirmed: None }
    }

    /// Waits for the next report: all pods of the node that are captured now. `None`: the reports have ended, which says
    /// nothing about the pods. Cancel safe.
    pub async fn next(&mut self) -> Option<BTreeSet<PodUid>> {
        let report = self.reports.message().await.ok().flatten()?;
        self.unconfirmed = Some(report.number);
        let pods = report.captured_pod_uids.iter().filter(|uid| !uid.is_empty());
        Some(pods.map(|uid| PodUid::from(uid.as_str())).collect())
    }

    /// Confirms the last report: peers are being told of it.
    pub async fn confirm(&mut self) {
        if let Some(number) = self.unconfirmed.take() {
            // Where nobody reads any more, `next` is about to say so.
            let _ = self.confirmations.send(Ok(CaptureConfirmed { number })).await;
        }
    }
}
