//! Who calls: what a token stands for.
//!
//! In a cluster in a box a file says it ([`mod@file`]); on Kubernetes the API server does ([`review`]). Whichever it is, a caller
//! that it does not vouch for is nobody, and the node of one that it does is the token's, whatever the caller says.

mod cache;
mod file;
mod review;

pub(crate) use file::Tokens as FileTokens;
pub(crate) use review::{NodeOfPod, Reviews};

use std::net::IpAddr;

use crate::problem::Problem;

/// The longest token that is looked at; a service account's has about 1,000 bytes.
const MAX_TOKEN: usize = 8 * 1024;

/// What a token stands for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Caller {
    pub(crate) role: Role,
    pub(crate) node: String,
}

/// Which process of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Role {
    Agent,
    Proxy,
}

impl Role {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Proxy => "proxy",
        }
    }
}

/// Why a token stands for nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unknown {
    /// It is not in the file.
    #[error("the token is not one that the control plane knows; give the node's own by --token")]
    NotInFile,
    /// It is no service account's token.
    #[error("the token is no service account's; give the one that kubelet projects by --token")]
    Malformed,
    /// It is another account's.
    #[error("the token is of another service account than justmtls-system/justmtls-node")]
    WrongAccount,
    /// It is for somebody else, or for both roles.
    #[error("the token's audience is not one of justmtls.dev/agent and justmtls.dev/proxy")]
    WrongAudience,
    /// It is not bound to a pod on a node.
    #[error(
        "the token is not bound to a pod of a node that the cluster knows; give the one that kubelet projects by --token"
    )]
    Unbound,
    /// The API server does not vouch for it.
    #[error("the API server does not vouch for the token: it has expired, its pod is gone, or it is forged")]
    NotVouchedFor,
    /// One source has too many tokens looked up.
    #[error("too many tokens from this address are looked up; try again later")]
    TooMany,
    /// Nobody can say, now.
    #[error(
        "the API server cannot be asked about the token, and the last answer is not valid any more; try again later"
    )]
    CannotAsk,
}

impl Unknown {
    /// The name in logs and metrics.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::NotInFile => "unknown-token",
            Self::Malformed => "malformed",
            Self::WrongAccount => "wrong-account",
            Self::WrongAudience => "wrong-audience",
            Self::Unbound => "unbound",
            Self::NotVouchedFor => "not-vouched-for",
            Self::TooMany => "too-many-reviews",
            Self::CannotAsk => "cannot-ask",
        }
    }
}

/// Whoever knows what tokens stand for.
pub(crate) enum Tokens {
    /// A file does.
    File(FileTokens),
    /// The API server does.
    Reviewed(Reviews),
}

impl Tokens {
    /// Who presents this token from there.
    pub(crate) async fn authenticate(&self, token: &str, from: IpAddr) -> Result<Caller, Unknown> {
        match self {
            Self::File(tokens) => tokens.authenticate(token).ok_or(Unknown::NotInFile),
            Self::Reviewed(reviews) => reviews.authenticate(token, from).await,
        }
    }

    /// Whether a token that stood for `known` does not any more, by the word of who knows: where he does not answer, it does.
    pub(crate) async fn is_disowned(&self, token: &str, known: &Caller) -> bool {
        match self {
            Self::File(tokens) => tokens.authenticate(token).as_ref() != Some(known),
            Self::Reviewed(reviews) => reviews.is_disowned(token, known).await,
        }
    }

    /// What is wrong with the source, if anything.
    pub(crate) fn problem(&self) -> Option<Problem> {
        match self {
            Self::File(tokens) => tokens.problem(),
            Self::Reviewed(_) => None,
        }
    }
}
