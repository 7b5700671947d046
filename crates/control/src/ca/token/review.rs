//! Tokens that kubelet projects, and the API server vouches for by TokenReview.
//!
//! A token's own words are read first, only to refuse: what is no token of ours costs the API server nothing. Then the API
//! server is asked, and only what it says counts.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use kube::api::PostParams;
use kube::{Client, Resource, core};
use manifests::k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use mesh::PodUid;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::cache::{Answer, Cache, Hash};
use super::{Caller, MAX_TOKEN, Role, Unknown};
use crate::clock::Clock;
use crate::control::Event;
use crate::kubernetes::{Failure, ask_in_silence};
use crate::metrics::Metrics;

/// The account of agents and proxies.
const ACCOUNT: &str = "system:serviceaccount:justmtls-system:justmtls-node";
const AGENT: &str = "justmtls.dev/agent";
const PROXY: &str = "justmtls.dev/proxy";
/// What the API server says beside the account's name.
const NODE: &str = "authentication.kubernetes.io/node-name";
const POD: &str = "authentication.kubernetes.io/pod-uid";
/// Reviews at a time. Calls with the same token share one.
const LANES: usize = 32;

/// Who knows the node of a pod: older API servers do not say it themselves.
#[derive(Clone)]
pub(crate) struct NodeOfPod(pub(crate) mpsc::Sender<Event>);

impl NodeOfPod {
    async fn ask(&self, pod: &str) -> Option<String> {
        let (answer, node) = oneshot::channel();
        self.0.send(Event::NodeOfPod { pod: PodUid::from(pod), answer }).await.ok()?;
        node.await.ok()?
    }
}

/// The API server's word for tokens.
pub(crate) struct Reviews {
    client: Client,
    nodes: NodeOfPod,
    clock: Clock,
    metrics: Arc<Metrics>,
    cache: Mutex<Cache>,
    /// By the first byte of a token's hash.
    lanes: Vec<tokio::sync::Mutex<()>>,
}

/// What a token says of itself.
#[derive(Deserialize)]
struct Claims {
    exp: u64,
    sub: String,
    aud: Audience,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Claims {
    fn read(token: &str) -> Option<Self> {
        let mut parts = token.split('.');
        let (_, claims, _) = (parts.next()?, parts.next()?, parts.next()?);
        let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).ok().filter(|_| parts.next().is_none())?;
        serde_json::from_slice(&claims).ok()
    }

    /// Why the API server need not be asked.
    fn refusal(&self, seconds: u64) -> Option<Unknown> {
        let is_ours = |audience: &String| role(audience).is_some();
        let for_us = match &self.aud {
            Audience::One(audience) => is_ours(audience),
            Audience::Many(audiences) => audiences.iter().any(is_ours),
        };
        match self {
            _ if self.sub != ACCOUNT => Some(Unknown::WrongAccount),
            _ if !for_us => Some(Unknown::WrongAudience),
            _ if self.exp <= seconds => Some(Unknown::NotVouchedFor),
            _ => None,
        }
    }
}

fn role(audience: &str) -> Option<Role> {
    match audience {
        AGENT => Some(Role::Agent),
        PROXY => Some(Role::Proxy),
        _ => None,
    }
}

impl Reviews {
    pub(crate) fn new(client: &Client, nodes: NodeOfPod, clock: Clock, metrics: Arc<Metrics>) -> Self {
        let lanes = (0..LANES).map(|_| tokio::sync::Mutex::new(())).collect();
        Self { client: client.clone(), nodes, clock, metrics, cache: Mutex::default(), lanes }
    }

    /// Who presents this token from there.
    pub(crate) async fn authenticate(&self, token: &str, from: IpAddr) -> Result<Caller, Unknown> {
        if token.len() > MAX_TOKEN {
            return Err(Unknown::Malformed);
        }
        let claims = Claims::read(token).ok_or(Unknown::Malformed)?;
        if let Some(refusal) = claims.refusal(self.seconds()) {
            return Err(refusal);
        }
        let hash: Hash = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.known(&hash) {
            return known;
        }
        if !self.cache().admit(from, self.clock.monotonic()) {
            return Err(Unknown::TooMany);
        }
        let _lane = self.lanes[usize::from(hash[0]) % LANES].lock().await;
        // Somebody with the same token may have asked while this one waited.
        if let Some(known) = self.known(&hash) {
            return known;
        }
        match self.review(token).await {
            Ok(Ok(caller)) => {
                self.metrics.review("vouched-for");
                self.cache().vouched(hash, caller.clone(), claims.exp, self.clock.monotonic(), self.seconds());
                Ok(caller)
            }
            Ok(Err(refusal)) => {
                self.metrics.review(refusal.as_str());
                self.cache().refused(hash, refusal.clone(), self.clock.monotonic());
                Err(refusal)
            }
            Err(failure) => {
                tracing::warn!(%failure, "a token cannot be reviewed");
                self.metrics.review(Unknown::CannotAsk.as_str());
                match self.cache().get(&hash, self.clock.monotonic(), self.seconds()) {
                    Answer::Fresh(caller) | Answer::Stale(caller) => Ok(caller),
                    Answer::Refused(_) | Answer::Nothing => Err(Unknown::CannotAsk),
                }
            }
        }
    }

    /// Whether the API server says, now, that a token does not stand for `known` any more. One that has expired, too: kubelet has
    /// another one for its process by then, which it could not have without an API server.
    pub(crate) async fn is_disowned(&self, token: &str, known: &Caller) -> bool {
        let hash: Hash = Sha256::digest(token.as_bytes()).into();
        let _lane = self.lanes[usize::from(hash[0]) % LANES].lock().await;
        match self.review(token).await {
            Ok(Ok(caller)) => caller != *known,
            // Whether its pod is bound may not be known now, and no answer is none.
            Ok(Err(Unknown::Unbound)) | Err(_) => false,
            Ok(Err(_)) => true,
        }
    }

    fn known(&self, hash: &Hash) -> Option<Result<Caller, Unknown>> {
        match self.cache().get(hash, self.clock.monotonic(), self.seconds()) {
            Answer::Fresh(caller) => Some(Ok(caller)),
            Answer::Refused(refusal) => Some(Err(refusal)),
            Answer::Stale(_) | Answer::Nothing => None,
        }
    }

    fn seconds(&self) -> u64 {
        self.clock.now().as_secs()
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn review(&self, token: &str) -> Result<Result<Caller, Unknown>, Failure> {
        let spec = TokenReviewSpec {
            token: Some(token.to_owned()),
            audiences: Some(vec![AGENT.to_owned(), PROXY.to_owned()]),
        };
        let review = TokenReview { spec, ..TokenReview::default() };
        let body = serde_json::to_vec(&review).map_err(|error| Failure::Refused(error.to_string()))?;
        let request = core::Request::new(TokenReview::url_path(&(), None)).create(&PostParams::default(), body);
        let review: TokenReview = ask_in_silence(&self.client, request).await?;
        Ok(self.judge(review.status.unwrap_or_default()).await)
    }

    /// What the API server's answer comes to.
    async fn judge(&self, status: TokenReviewStatus) -> Result<Caller, Unknown> {
        if status.authenticated != Some(true) {
            return Err(Unknown::NotVouchedFor);
        }
        let user = status.user.unwrap_or_default();
        if user.username.as_deref() != Some(ACCOUNT) {
            return Err(Unknown::WrongAccount);
        }
        // One that names no audience has not looked at them, and one token is of one process.
        let roles: Vec<_> = status.audiences.iter().flatten().filter_map(|audience| role(audience)).collect();
        let [role] = roles[..] else { return Err(Unknown::WrongAudience) };
        let pod = extra(&user, POD).ok_or(Unknown::Unbound)?;
        let node = match extra(&user, NODE) {
            Some(node) => node.to_owned(),
            None => self.nodes.ask(pod).await.ok_or(Unknown::Unbound)?,
        };
        Ok(Caller { role, node })
    }
}

/// The one value of a key, if there is one.
fn extra<'a>(user: &'a UserInfo, key: &str) -> Option<&'a str> {
    match user.extra.as_ref()?.get(key)?.as_slice() {
        [value] if !value.is_empty() => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::kubernetes::fake::Fake;

    const FROM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    struct Bed {
        fake: Fake,
        clock: Clock,
        reviews: Reviews,
    }

    fn bed() -> Bed {
        let (fake, clock) = (Fake::default(), Clock::default());
        let (events, mut asked) = mpsc::channel(8);
        tokio::spawn(async move {
            while let Some(Event::NodeOfPod { pod, answer }) = asked.recv().await {
                let _ = answer.send((pod.as_str() == "uid-1").then(|| "node-by-watch".to_owned()));
            }
        });
        let reviews = Reviews::new(&fake.client(), NodeOfPod(events), clock.clone(), Arc::new(Metrics::new()));
        Bed { fake, clock, reviews }
    }

    impl Bed {
        fn token(&self, change: impl FnOnce(&mut Value)) -> String {
            let mut claims = json!({ "exp": self.clock.now().as_secs() + 3600, "sub": ACCOUNT, "aud": [PROXY] });
            change(&mut claims);
            format!("e30.{}.c2lnbmF0dXJl", BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()))
        }

        async fn ask(&self, token: &str) -> Result<Caller, Unknown> {
            self.reviews.authenticate(token, FROM).await
        }
    }

    fn status(change: impl FnOnce(&mut Value)) -> Value {
        let extra = json!({ POD: ["uid-1"], NODE: ["node-a"] });
        let mut status =
            json!({ "authenticated": true, "audiences": [PROXY], "user": { "username": ACCOUNT, "extra": extra } });
        change(&mut status);
        status
    }

    #[tokio::test]
    async fn a_token_is_what_the_api_server_says_and_is_asked_about_once_a_minute() {
        let bed = bed();
        bed.fake.review_by(|spec| {
            assert_eq!(spec["audiences"], json!([AGENT, PROXY]));
            status(|_| {})
        });
        let token = bed.token(|_| {});
        let caller = Caller { role: Role::Proxy, node: "node-a".to_owned() };
        for _ in 0..100 {
            assert_eq!(bed.ask(&token).await, Ok(caller.clone()));
        }
        assert_eq!(bed.fake.reviews(), 1);
        bed.clock.advance(Duration::from_secs(61));
        let (one, two) = tokio::join!(bed.ask(&token), bed.ask(&token));
        assert!(one.is_ok() && two.is_ok());
        assert_eq!(bed.fake.reviews(), 2, "those that ask at once share a review");
        bed.fake.review_by(|_| json!({ "authenticated": false, "error": "its pod is gone" }));
        bed.clock.advance(Duration::from_secs(61));
        assert_eq!(bed.ask(&token).await, Err(Unknown::NotVouchedFor));
    }

    #[tokio::test]
    async fn what_is_no_token_of_ours_is_refused_by_name_without_asking() {
        let bed = bed();
        let past = bed.clock.now().as_secs() - 1;
        for (token, why) in [
            (String::new(), Unknown::Malformed),
            ("a.b.c".to_owned(), Unknown::Malformed),
            ("x".repeat(100_000), Unknown::Malformed),
            (bed.token(|_| {}) + ".more", Unknown::Malformed),
            (bed.token(|claims| claims["sub"] = json!("system:serviceaccount:shop:web")), Unknown::WrongAccount),
            (bed.token(|claims| claims["aud"] = json!("https://kubernetes.default.svc")), Unknown::WrongAudience),
            (bed.token(|claims| claims["exp"] = json!(past)), Unknown::NotVouchedFor),
        ] {
            assert_eq!(bed.ask(&token).await, Err(why), "{token:.80}");
        }
        assert_eq!(bed.fake.reviews(), 0);
    }

    #[tokio::test]
    async fn what_the_api_server_does_not_say_in_full_is_refused_by_name() {
        let bed = bed();
        fn extra(status: &mut Value, key: &str, value: Value) {
            status["user"]["extra"][key] = value;
        }
        let refused: Vec<(Value, Unknown)> = vec![
            (status(|status| status["authenticated"] = json!(false)), Unknown::NotVouchedFor),
            (json!({}), Unknown::NotVouchedFor),
            (status(|status| status["user"]["username"] = json!("system:node:node-a")), Unknown::WrongAccount),
            (status(|status| status["audiences"] = json!([])), Unknown::WrongAudience),
            (status(|status| status["audiences"] = json!([AGENT, PROXY])), Unknown::WrongAudience),
            (status(|status| extra(status, POD, json!([]))), Unknown::Unbound),
            (
                status(|status| {
                    extra(status, POD, json!(["uid-2"]));
                    extra(status, NODE, json!([]))
                }),
                Unknown::Unbound,
            ),
        ];
        for (number, (status, why)) in refused.into_iter().enumerate() {
            bed.fake.review_by(move |_| status.clone());
            let token = bed.token(|claims| claims["number"] = json!(number));
            assert_eq!(bed.ask(&token).await, Err(why.clone()), "{why}");
            assert_eq!(bed.ask(&token).await, Err(why));
        }
        assert_eq!(bed.fake.reviews(), 7, "a refusal counts for a while");
        bed.fake.review_by(|_| status(|status| extra(status, NODE, json!([]))));
        let older = bed.token(|claims| claims["number"] = json!(100));
        assert_eq!(bed.ask(&older).await.unwrap().node, "node-by-watch");
    }

    #[tokio::test]
    async fn while_the_api_server_is_away_the_last_answer_counts_until_the_tokens_end() {
        let bed = bed();
        bed.fake.review_by(|_| status(|_| {}));
        let token = bed.token(|_| {});
        assert!(bed.ask(&token).await.is_ok());
        bed.fake.fail_with(Some(503));
        bed.clock.advance(Duration::from_secs(600));
        assert!(bed.ask(&token).await.is_ok());
        let stranger = bed.token(|claims| claims["number"] = json!(1));
        assert_eq!(bed.ask(&stranger).await, Err(Unknown::CannotAsk));
        bed.clock.advance(Duration::from_secs(3600));
        assert_eq!(bed.ask(&token).await, Err(Unknown::NotVouchedFor));
    }

    #[tokio::test]
    async fn a_token_is_disowned_by_the_word_of_the_api_server_alone() {
        let bed = bed();
        let (token, known) = (bed.token(|_| {}), Caller { role: Role::Proxy, node: "node-a".to_owned() });
        bed.fake.review_by(|_| status(|_| {}));
        assert!(!bed.reviews.is_disowned(&token, &known).await);
        let other = Caller { role: Role::Proxy, node: "node-b".to_owned() };
        assert!(bed.reviews.is_disowned(&token, &other).await);
        bed.fake.review_by(|_| status(|status| status["user"]["extra"] = json!({})));
        assert!(!bed.reviews.is_disowned(&token, &known).await, "whose it is may not be known now");
        bed.fake.review_by(|_| json!({ "authenticated": false }));
        assert!(bed.reviews.is_disowned(&token, &known).await);
        // Also where it has expired meanwhile: nobody can have another one.
        bed.fake.fail_with(Some(503));
        bed.clock.advance(Duration::from_secs(7200));
        assert!(!bed.reviews.is_disowned(&token, &known).await);
    }

    #[tokio::test]
    async fn a_source_that_has_too_many_tokens_looked_up_is_refused() {
        let bed = bed();
        bed.fake.review_by(|_| json!({ "authenticated": false }));
        let mut refused = Vec::new();
        for number in 0..100 {
            refused.push(bed.ask(&bed.token(|claims| claims["number"] = json!(number))).await.unwrap_err());
        }
        assert!(refused.contains(&Unknown::TooMany) && bed.fake.reviews() < 50);
        let elsewhere = IpAddr::from([192, 0, 2, 1]);
        let token = bed.token(|claims| claims["number"] = json!(1000));
        assert_eq!(bed.reviews.authenticate(&token, elsewhere).await, Err(Unknown::NotVouchedFor));
    }
}
