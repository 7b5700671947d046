//! Capture in a real kernel, with a proxy that only copies; and the agent itself, between a runtime, a proxy and a control
//! plane that say what a test wants them to say.

mod armed;
mod control;
mod frames;
mod guard;
mod keep;
mod lab;
mod leaving;
mod node;
mod proxy;
mod repair;
mod runtime;
mod succession;
mod traffic;
mod world;
