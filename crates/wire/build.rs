//! Compiles the protocol definitions in `proto/` without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "envoy/discovery.proto",
        "istio/workload.proto",
        "istio/authorization.proto",
        "istio/ca.proto",
        "justmtls/v1/probes.proto",
        "justmtls/v1/discovery.proto",
        "justmtls/v1/report.proto",
        "justmtls/v1/pods.proto",
        "justmtls/v1/tunnel.proto",
        "cri/runtime.proto",
    ];
    let definitions = protox::compile(files, ["proto"])?;
    // Ordered maps: a resource has one encoding, so that its hash can be its version.
    tonic_prost_build::configure().btree_map(".").compile_fds(definitions)?;
    Ok(())
}
