#if canImport(CoreML)

import CoreML
import Foundation

/// A model that runs: it reads text, remembers it, and continues it.
///
/// It has one memory. What `generate` reads and writes stays in it until `reset` or `restore`; one thing is done at a time,
/// and what is asked for meanwhile waits.
public actor RWKVModel {
    public nonisolated let bundle: ModelBundle
    /// Nil where the bundle has none.
    public nonisolated let tokenizer: (any TextTokenizer)?
    private let runner: Runner
    /// Tokens that belong to the text and are not read yet: reading waits until its result is needed.
    private var pending: [Int] = []
    private var isBusy = false

    /// Open a bundle: compile what was not compiled before, which may take long, and load it.
    ///
    /// - Parameters:
    ///   - folder: the bundle
    ///   - computeUnits: where Core ML may run it; `.cpuAndNeuralEngine` fits bundles of the profile ane, `.cpuAndGPU` those of gpu
    ///   - verify: compare every file with the manifest's sha256
    ///   - cache: a folder for compiled models; nil for one in Application Support
    public static func open(
        _ folder: URL, computeUnits: MLComputeUnits = .all, verify: Bool = false, cache: URL? = nil
    ) async throws -> RWKVModel {
        let bundle = try ModelBundle(folder: folder, verify: verify)
        let tokenizer = try bundle.openTokenizer()
        let runner = try await Runner(bundle, units: computeUnits, cache: cache)
        return RWKVModel(bundle, tokenizer, runner)
    }

    private init(_ bundle: ModelBundle, _ tokenizer: (any TextTokenizer)?, _ runner: Runner) {
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.runner = runner
    }

    /// Read a prompt on top of what was read before, and continue it.
    ///
    /// The text comes in whole characters. To end it early, stop iterating, or cancel the task that does.
    ///
    /// - Parameters:
    ///   - prompt: text; may be empty if something was read before
    ///   - maxTokens: the most tokens to generate; it may end earlier, at the end of text
    ///   - stop: texts that end it and are not part of it, nor of what the model remembers
    ///   - sampling: nil for the bundle's
    ///   - seed: the same seed gives the same tokens; nil different ones each time
    public nonisolated func generate(
        prompt: String, maxTokens: Int, stop: [String] = [], sampling: Sampling? = nil, seed: UInt64? = nil
    ) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.run(prompt, maxTokens, stop, sampling, seed) { text in
                        _ = continuation.yield(text)
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Read tokens on top of what was read before: the logits that follow.
    public func feed(_ ids: [Int]) async throws -> [Float] {
        try await begin()
        defer { isBusy = false }
        return try await read(ids)
    }

    /// Forget everything: the next text begins from the start.
    public func reset() async throws {
        try await begin()
        defer { isBusy = false }
        try runner.load(nil)
        pending = []
    }

    /// Copy out what the model remembers.
    public func state() async throws -> SavedState {
        try await begin()
        defer { isBusy = false }
        if !pending.isEmpty { _ = try await read([]) }
        return try runner.save()
    }

    /// Go on from a state of this model, whatever the width of the weights that made it.
    public func restore(_ state: SavedState) async throws {
        try await begin()
        defer { isBusy = false }
        try runner.load(state)
        pending = []
    }

    /// Write what the model remembers to a state file.
    public func save(to file: URL) async throws {
        try await state().write(to: file)
    }

    /// Go on from a state file of this model.
    public func restore(from file: URL) async throws {
        try await restore(SavedState(contentsOf: file, manifest: bundle.manifest))
    }

    // MARK: - One thing at a time

    /// Wait until nothing else is being done, and take the turn; `isBusy = false` gives it back.
    private func begin() async throws {
        while isBusy { try await Task.sleep(for: .milliseconds(2)) }
        isBusy = true
    }

    /// Read what is pending and these tokens: all of them, or on a failure or a cancellation none.
    private func read(_ ids: [Int]) async throws -> [Float] {
        let all = pending + ids
        if !all.isEmpty {
            let before = try all.count > 1 ? runner.snapshot() : nil
            do {
                var place = 0
                while place < all.count {
                    let n = all.count - place >= runner.chunk ? runner.chunk : 1
                    try runner.step(Array(all[place..<place + n]))
                    place += n
                    if all.count > 1 {
                        try Task.checkCancellation()
                        await Task.yield()
                    }
                }
            } catch {
                if let before { try runner.restore(before) }
                throw error
            }
            pending = []
        }
        guard let logits = runner.logits else {
            throw RWKVError.input("There are no tokens to read: give a prompt, or a state to go on from.")
        }
        return logits
    }

    private func run(
        _ prompt: String, _ maxTokens: Int, _ stop: [String], _ sampling: Sampling?, _ seed: UInt64?, _ say: @Sendable (String) -> Void
    ) async throws {
        guard let tokenizer else {
            throw RWKVError.tokenizer("The bundle has no tokenizer: export it with --tokenizer.")
        }
        var sampler = try Sampler(sampling ?? bundle.manifest.sampling, seed: seed)
        var stops = try StopTexts(stop)
        let limit = min(tokenizer.nVocab, bundle.manifest.spec.nVocab)  // rows beyond only fill the table
        let ids = try tokenizer.encode(prompt)
        try await begin()
        defer { isBusy = false }
        var logits = try await read(ids)
        let stream = tokenizer.stream(after: ids)
        // before what may be a stop: the state, and the text given since then
        var mark: (state: Runner.Snapshot, text: String)?
        for n in 0..<max(maxTokens, 0) {
            if n > 0 { logits = try await read([]) }
            if Task.isCancelled {
                try goBack(to: mark, tokenizer)
                throw CancellationError()
            }
            let token = try sampler.choose(logits, limit: limit)
            if token == bundle.manifest.tokenizer?.endOfText { break }
            sampler.add(token, text: tokenizer.decode([token]))
            let (text, stopped) = stops.push(stream.push(token))
            if stopped || stops.isHolding || (stream.isUnfinished && !stop.isEmpty) {
                // the state has not read this token yet
                if mark == nil {
                    let now = try runner.snapshot()
                    mark = (state: now, text: "")
                }
                mark?.text += text
            } else {
                mark = nil
            }
            pending = [token]
            if !text.isEmpty { say(text) }
            if stopped {
                try goBack(to: mark, tokenizer)
                return
            }
            await Task.yield()
        }
        let rest = stops.push(stream.finish()).text + stops.finish()
        if !rest.isEmpty { say(rest) }
    }

    /// Forget what was held back and is not part of the text.
    private func goBack(to mark: (state: Runner.Snapshot, text: String)?, _ tokenizer: any TextTokenizer) throws {
        guard let mark else { return }
        try runner.restore(mark.state)
        pending = try mark.text.isEmpty ? [] : tokenizer.encode(mark.text)
    }
}

#endif
