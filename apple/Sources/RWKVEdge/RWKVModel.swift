#if canImport(CoreML)

import CoreML
import Foundation

/// A model that runs: it reads text, remembers it, and continues it.
///
/// It has one memory. What `generate` reads and writes stays in it until `reset` or `restore`; one thing is done at a time,
/// and what is asked for meanwhile waits for its turn.
public actor RWKVModel {
    public nonisolated let bundle: ModelBundle
    /// Nil where the bundle has none.
    public nonisolated let tokenizer: (any TextTokenizer)?
    private let runner: Runner
    /// Tokens that belong to the text and are not read yet: reading waits until its result is needed.
    private var pending: [Int] = []
    /// The text that may go on: since its last piece nothing else was read, reset or restored.
    private var current: Generation.Text?
    private var isBusy = false
    private var waiting: [(id: UUID, turn: CheckedContinuation<Void, any Error>)] = []

    /// Open a bundle: compile what was not compiled before, which may take long, and load it.
    ///
    /// - Parameters:
    ///   - folder: the bundle
    ///   - computeUnits: where Core ML may run it; nil for what the bundle's profile is made for: the CPU and the Neural Engine (ane),
    ///     or the CPU and the GPU (gpu)
    ///   - verify: compare every file with the manifest's sha256
    ///   - cache: a folder for compiled models alone; nil for one in Application Support
    public static func open(
        _ folder: URL, computeUnits: MLComputeUnits? = nil, verify: Bool = false, cache: URL? = nil
    ) async throws -> RWKVModel {
        let bundle = try ModelBundle(folder: folder, verify: verify)
        let tokenizer = try bundle.openTokenizer()
        let own: [String: MLComputeUnits] = ["ane": .cpuAndNeuralEngine, "gpu": .cpuAndGPU]
        let units = computeUnits ?? own[bundle.manifest.graphs[0].profile] ?? .all
        let runner = try await Runner(bundle, units: units, cache: cache)
        return RWKVModel(bundle, tokenizer, runner)
    }

    /// Remove the compiled models of all bundles but these, such as those of an app's earlier release.
    ///
    /// - Parameter cache: as `open` was given it
    public static func removeCompiledModels(except bundles: [ModelBundle], cache: URL? = nil) throws {
        try CompiledModels.removeAll(except: bundles, cache: cache)
    }

    private init(_ bundle: ModelBundle, _ tokenizer: (any TextTokenizer)?, _ runner: Runner) {
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.runner = runner
    }

    /// Read a prompt on top of what was read before, and continue it.
    ///
    /// The text comes in whole characters. Nothing is computed before it is asked for: to end it early, stop iterating, or cancel
    /// the task that does. What the model then remembers ends with the last piece.
    ///
    /// - Parameters:
    ///   - prompt: text; an empty one goes on from what was read before, or from the token that begins a text. An end of text in
    ///     it is left out
    ///   - maxTokens: the most tokens to generate; it may end earlier, at the end of text
    ///   - stop: texts that end it and are not part of it, nor of what the model remembers
    ///   - sampling: nil for the bundle's
    ///   - seed: the same seed gives the same tokens; nil different ones each time
    public nonisolated func generate(
        prompt: String, maxTokens: Int, stop: [String] = [], sampling: Sampling? = nil, seed: UInt64? = nil
    ) -> Generation {
        Generation(
            self, prompt: .text(prompt), maxTokens: maxTokens, stop: stop, sampling: sampling ?? bundle.manifest.sampling, seed: seed)
    }

    /// Read a turn of a conversation, and answer it. What a person says in it is text, and never a special token.
    ///
    /// Penalties count within the answer.
    ///
    /// - Parameters: as of `generate(prompt:)`; stop is the template's
    public nonisolated func generate(
        turn: ChatTemplate.Turn, maxTokens: Int, stop: [String], sampling: Sampling? = nil, seed: UInt64? = nil
    ) -> Generation {
        Generation(self, prompt: .turn(turn), maxTokens: maxTokens, stop: stop, sampling: sampling ?? bundle.manifest.sampling, seed: seed)
    }

    /// Read tokens on top of what was read before: the logits that follow.
    public func feed(_ ids: [Int]) async throws -> [Float] {
        try await begin()
        defer { end() }
        try leave()
        return try await read(ids)
    }

    /// Forget everything: the next text begins from the start.
    public func reset() async throws {
        try await begin()
        defer { end() }
        try load(nil)
    }

    /// Copy out what the model remembers.
    public func state() async throws -> SavedState {
        try await begin()
        defer { end() }
        guard let mark = current?.mark else { return try await saved() }
        // what may be the beginning of a stop was not heard and is left out; the text can go on from where it is
        let (now, unread) = (try runner.snapshot(), pending)
        let found: Result<SavedState, any Error>
        do {
            try goBack(to: mark)
            found = .success(try await saved())
        } catch {
            found = .failure(error)
        }
        try runner.restore(now)
        pending = unread
        return try found.get()
    }

    /// Go on from a state of this model, whatever the width of the weights that made it.
    public func restore(_ state: SavedState) async throws {
        try await begin()
        defer { end() }
        try load(state)
    }

    /// Write what the model remembers to a state file, replacing a state file of that name and nothing else.
    public func save(to file: URL) async throws {
        try await state().write(to: file)
    }

    /// Go on from a state file of this model.
    public func restore(from file: URL) async throws {
        try await restore(SavedState(contentsOf: file, manifest: bundle.manifest))
    }

    /// Free the memory of the function that reads long prompts, until the next one. It is not loaded before the first.
    public func unloadPrefill() async throws {
        try await begin()
        defer { end() }
        runner.unloadPrefill()
    }

    // MARK: - One thing at a time

    /// Wait for the turn; `end` gives it to who has waited longest.
    private func begin() async throws {
        guard isBusy else {
            isBusy = true
            return
        }
        let id = UUID()
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { waiting.append((id, $0)) }
        } onCancel: {
            Task { await self.leaveQueue(id) }
        }
    }

    private func end() {
        if waiting.isEmpty {
            isBusy = false
        } else {
            waiting.removeFirst().turn.resume()
        }
    }

    /// Throw where somebody still waits: who has the turn already keeps it.
    private func leaveQueue(_ id: UUID) {
        guard let place = waiting.firstIndex(where: { $0.id == id }) else { return }
        waiting.remove(at: place).turn.resume(throwing: CancellationError())
    }

    // MARK: - On a turn

    private func load(_ state: SavedState?) throws {
        try runner.load(state)
        pending = []
        current = nil
    }

    private func saved() async throws -> SavedState {
        if !pending.isEmpty { _ = try await read([]) }
        return try runner.save()
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
                    if n > 1 { try await runner.loadPrefill() }
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
        guard let logits = try runner.logits() else {
            throw RWKVError.input("There are no tokens to read: give a prompt, or a state to go on from.")
        }
        return logits
    }

    /// The next piece of a text; nil at its end.
    func next(of generation: Generation) async throws -> String? {
        try await begin()
        defer { end() }
        if generation.text == nil { try await start(generation) }
        guard let text = generation.text, text.finish == nil else { return nil }
        guard current === text else {
            throw RWKVError.input("The model was asked for something else since the last piece of this text: generate again to go on.")
        }
        let limit = min(text.tokenizer.nVocab, bundle.manifest.spec.nVocab)  // rows beyond only fill the table
        while true {
            let logits = try await read([])
            try Task.checkCancellation()
            let token = try text.sampler.choose(logits, limit: limit)
            if isEnd(token) { return finish(text, .end) }
            let (piece, isStopped) = text.stops.push(text.stream.push(token))
            if isStopped || text.mayGoBack {
                // the state has not read this token yet
                let mark = try text.mark ?? (state: runner.snapshot(), text: "")
                text.mark = (mark.state, mark.text + piece)
            } else {
                text.mark = nil
            }
            text.sampler.add(token, text: text.tokenizer.decode([token]))
            runner.occurrences = text.sampler.occurrences
            pending = [token]
            text.nLeft -= 1
            if isStopped {
                try leave()
                return finish(text, .stop, piece)
            }
            if text.nLeft == 0 { return finish(text, .length, piece) }
            if !piece.isEmpty { return piece }
            await Task.yield()
        }
    }

    /// Read the prompt of a text.
    private func start(_ generation: Generation) async throws {
        guard let tokenizer else {
            throw RWKVError.tokenizer("The bundle has no tokenizer: export it with --tokenizer.")
        }
        var ids: [Int]
        switch generation.prompt {
        case .text(let text): ids = try tokenizer.encode(text).filter { !isEnd($0) }
        case .turn(let turn): ids = try turn.encode(tokenizer)
        }
        try generation.sampling.check()
        _ = try StopTexts(generation.stop)
        try leave()
        if ids.isEmpty, pending.isEmpty, runner.nTokens == 0 { ids = [bundle.manifest.tokenizer?.bosTokenID ?? 0] }
        if case .turn = generation.prompt { runner.occurrences = nil }
        // where a text begins, there is nothing before it
        let before = (runner.recent + pending + ids).split(separator: bundle.manifest.tokenizer?.bosTokenID ?? 0, omittingEmptySubsequences: false)
        let text = try Generation.Text(generation, tokenizer, after: Array(before.last ?? []), occurrences: runner.occurrences)
        _ = try await read(ids)
        (generation.text, current) = (text, text)
        if text.nLeft <= 0 { _ = finish(text, .length) }
    }

    /// Whether a token ends a text.
    private func isEnd(_ token: Int) -> Bool {
        bundle.manifest.tokenizer?.eosTokenIDs.contains(token) ?? false
    }

    /// End a text; give its last piece, with what was held back unless that was a stop.
    private func finish(_ text: Generation.Text, _ why: Generation.Finish, _ piece: String = "") -> String? {
        let last = piece + (why == .stop ? "" : text.stops.push(text.stream.finish()).text + text.stops.finish())
        text.finish = why
        text.mark = nil
        current = nil
        return last.isEmpty ? nil : last
    }

    func finish(of generation: Generation) -> Generation.Finish? {
        generation.text?.finish
    }

    /// Let the text that was going on end with its last piece: what was held back is forgotten.
    private func leave() throws {
        if let mark = current?.mark { try goBack(to: mark) }
        current = nil
    }

    private func goBack(to mark: Generation.Mark) throws {
        guard let tokenizer else { return }
        try runner.restore(mark.state)
        pending = try mark.text.isEmpty ? [] : tokenizer.encode(mark.text, specialTokens: false)
        guard var sampler = current?.sampler, runner.occurrences != nil else { return }
        sampler.occurrences = runner.occurrences
        for token in pending { sampler.add(token, text: tokenizer.decode([token])) }
        runner.occurrences = sampler.occurrences
    }
}

#endif
