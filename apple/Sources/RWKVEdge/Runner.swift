#if canImport(CoreML)

import CoreML
import Foundation

/// Runs the step of a bundle: tokens in, logits and a state out. For one task at a time; `RWKVModel` sees to that.
final class Runner {
    /// A package: its two functions, and its share of the state where that is packed.
    private struct Part {
        let graphs: (decode: Manifest.Graph, prefill: Manifest.Graph)
        let decode: MLModel
        /// Nil until it is needed.
        var prefill: MLModel?
        let packed: (state: MLState, about: Manifest.Packed)?
    }

    /// A state that can be gone back to.
    struct Snapshot {
        /// Explicit: the arrays themselves, which nobody writes to after Core ML gave them.
        fileprivate let explicit: [String: MLFeatureValue]
        /// Packed: copies, one for each part.
        fileprivate let packed: [[Float]]
        fileprivate let nTokens: Int
        fileprivate let recent: [Int]
        fileprivate let occurrences: [Int: Double]?
        fileprivate let logits: Logits
    }

    /// After the last token: as Core ML gave them, or as numbers.
    fileprivate enum Logits {
        case given(MLMultiArray)
        case read([Float]?)
    }

    private let bundle: ModelBundle
    private let units: MLComputeUnits
    private let cache: URL?
    private var manifest: Manifest { bundle.manifest }
    private var parts: [Part] = []
    /// The state that every text begins from.
    private let first: SavedState
    /// State input -> what to hand to the next call.
    private var explicit: [String: MLFeatureValue] = [:]
    private var lastLogits = Logits.read(nil)
    /// Whether a call failed while a packed state was being changed, part by part: it is neither before the call nor after it.
    private var isTorn = false

    /// Tokens that the state has read.
    private(set) var nTokens = 0
    /// The last of them, as a state keeps them; none without a tokenizer.
    private(set) var recent: [Int] = []
    /// What was generated until now, as penalties count; nil where none were on.
    var occurrences: [Int: Double]?
    /// How many tokens prefill takes in one call.
    let chunk: Int

    init(_ bundle: ModelBundle, units: MLComputeUnits, cache: URL?) async throws {
        (self.bundle, self.units, self.cache) = (bundle, units, cache)
        let graphs = bundle.manifest.graphs.sorted { $0.part < $1.part }
        let prefill = graphs.filter { $0.function == "prefill" }
        chunk = prefill[0].nTokens
        if let name = bundle.manifest.initialState {
            first = try SavedState(contentsOf: bundle.url(of: name), manifest: bundle.manifest)
        } else {
            first = SavedState(firstOf: bundle.manifest)
        }
        // of every part there is one of each: ModelBundle has looked
        for (decode, prefill) in zip(graphs.filter { $0.function == "decode" }, prefill) {
            let model = try await CompiledModels.load(decode, of: bundle, units: units, cache: cache)
            // made once, used by both functions: the memory of a text is one
            let packed = decode.packed.map { (state: model.makeState(), about: $0) }
            parts.append(Part(graphs: (decode, prefill), decode: model, packed: packed))
        }
        try load(nil)
    }

    /// Load what reads `chunk` tokens at once. It stays loaded until `unloadPrefill`.
    ///
    /// Not loaded before it is needed: memory is reported to grow with every function that is (coremltools' issue 2351).
    func loadPrefill(isolation: isolated (any Actor)? = #isolation) async throws {
        for i in parts.indices where parts[i].prefill == nil {
            parts[i].prefill = try await CompiledModels.load(parts[i].graphs.prefill, of: bundle, units: units, cache: cache)
        }
    }

    func unloadPrefill() {
        for i in parts.indices { parts[i].prefill = nil }
    }

    /// The logits after the last token; nil before the first. Made numbers when they are read: of a long prompt, only the last.
    func logits() throws -> [Float]? {
        switch lastLogits {
        case .read(let values): return values
        case .given(let array):
            let values = try array.floats()
            lastLogits = .read(values)
            return values
        }
    }

    /// Read tokens: one, or with prefill loaded `chunk` of them.
    func step(_ tokens: [Int]) throws {
        try refuseTorn()
        if let wrong = tokens.first(where: { !(0..<manifest.spec.nVocab).contains($0) }) {
            throw RWKVError.input("Token \(wrong) is outside the vocabulary of 0 to \(manifest.spec.nVocab - 1).")
        }
        isTorn = parts.contains { $0.packed != nil }
        try autoreleasepool { () -> Void in
            // what goes from part to part
            var passed = ["tokens": MLFeatureValue(multiArray: try MLMultiArray.tokens(tokens))]
            var state: [String: MLFeatureValue] = [:]
            for part in parts {
                guard let model = tokens.count == 1 ? part.decode : part.prefill else { throw RWKVError.model("Prefill is not loaded.") }
                let graph = tokens.count == 1 ? part.graphs.decode : part.graphs.prefill
                var inputs: [String: MLFeatureValue] = [:]
                for input in graph.inputs {
                    guard let value = explicit[input.name] ?? passed[input.name] else {
                        throw RWKVError.bundle("\(graph.file) takes \(input.name), which nothing gives: export the bundle again.")
                    }
                    inputs[input.name] = value
                }
                let given = try predict(model, inputs, part.packed?.state)
                for output in graph.outputs {
                    guard let value = given.featureValue(for: output.name) else {
                        throw RWKVError.model("\(graph.file) gave no \(output.name).")
                    }
                    let name = output.name.hasSuffix("_out") ? String(output.name.dropLast(4)) : output.name
                    if explicit[name] != nil {
                        state[name] = value  // the next input, as it is: no copy
                    } else {
                        passed[name] = value
                    }
                }
            }
            guard let array = passed["logits"]?.multiArrayValue, array.count == manifest.spec.nVocab, state.count == explicit.count else {
                throw RWKVError.model("The model did not give the logits and the state that the manifest promises.")
            }
            // together, and only now: what fails above leaves an explicit state as it was
            explicit = state
            lastLogits = .given(array)
            nTokens += tokens.count
            recent = manifest.tokenizerSHA256 == nil ? [] : Array((recent + tokens).suffix(SavedState.nRecent))
            isTorn = false
        }
    }

    private func predict(_ model: MLModel, _ inputs: [String: MLFeatureValue], _ state: MLState?) throws -> MLFeatureProvider {
        do {
            let given = try MLDictionaryFeatureProvider(dictionary: inputs)
            if let state {
                return try model.prediction(from: given, using: state)
            }
            return try model.prediction(from: given)
        } catch {
            throw RWKVError.model("Core ML failed: \(error.localizedDescription)")
        }
    }

    // MARK: - State

    private func refuseTorn() throws {
        if isTorn {
            throw RWKVError.state("An earlier call failed half-way, so what the model remembers is of no use: reset or restore it.")
        }
    }

    func snapshot() throws -> Snapshot {
        try refuseTorn()
        return Snapshot(
            explicit: explicit, packed: try parts.compactMap { try read($0) }, nTokens: nTokens, recent: recent, occurrences: occurrences,
            logits: lastLogits)
    }

    func restore(_ snapshot: Snapshot) throws {
        for (part, values) in zip(parts, snapshot.packed) { try write(values, part) }
        explicit = snapshot.explicit
        nTokens = snapshot.nTokens
        (recent, occurrences) = (snapshot.recent, snapshot.occurrences)
        lastLogits = snapshot.logits
        isTorn = false
    }

    /// Begin from a state, or with nil from where every text begins.
    func load(_ saved: SavedState?) throws {
        let saved = saved ?? first
        try saved.check(manifest)
        // as a graph holds it; that every tensor is there, and of its size, ModelBundle and `check` have seen
        var held: [String: [Float]] = [:]
        for tensor in manifest.state {
            let values = (saved.tensors[tensor.name]?.values ?? []).map { $0 / tensor.factor }
            // RWKV-4's exponent of nothing read, -1e30, becomes the smallest number, which does as well
            guard tensor.name.hasSuffix(".pp") || values.allSatisfy({ abs($0) <= 65504 }) else {
                throw RWKVError.state("\(tensor.name) of the state holds numbers that float16 does not: go on with it in another runtime.")
            }
            held[tensor.name] = values
        }
        var explicit: [String: MLFeatureValue] = [:]
        for part in parts {
            if let about = part.packed?.about {
                var whole = [Float](repeating: 0, count: about.shape.reduce(1, *))
                for (name, range) in about.places { whole.replaceSubrange(range, with: held[name] ?? []) }
                try write(whole, part)
            }
            for input in part.graphs.decode.inputs where input.name.hasPrefix("state_") {
                let elements = held[Manifest.Graph.tensor(of: input.name)] ?? []
                explicit[input.name] = MLFeatureValue(multiArray: try MLMultiArray.halves(elements, shape: input.shape))
            }
        }
        self.explicit = explicit
        nTokens = saved.nTokens
        // ids of another tokenizer are of no use here
        recent = saved.tokenizer == manifest.tokenizerSHA256 ? saved.recent : []
        occurrences = saved.occurrences
        lastLogits = .read(saved.logits)
        isTorn = false
    }

    /// Copy the state out, as a state file has it.
    func save() throws -> SavedState {
        try refuseTorn()
        var values: [String: [Float]] = [:]
        for (input, value) in explicit { values[Manifest.Graph.tensor(of: input)] = try value.multiArrayValue?.floats() }
        for part in parts {
            guard let about = part.packed?.about, let whole = try read(part) else { continue }
            for (name, range) in about.places { values[name] = Array(whole[range]) }
        }
        var tensors: [String: SavedState.Tensor] = [:]
        for tensor in manifest.state {
            let held = values[tensor.name] ?? []
            tensors[tensor.name] = SavedState.Tensor(shape: tensor.shape, values: tensor.factor == 1 ? held : held.map { $0 * tensor.factor })
        }
        let saved = SavedState(
            modelID: manifest.modelID, nTokens: nTokens, tensors: tensors, logits: nTokens > 0 ? try logits() : nil, recent: recent,
            tokenizer: recent.isEmpty ? nil : manifest.tokenizerSHA256, occurrences: occurrences)
        try saved.check(manifest)
        return saved
    }

    /// A part's packed state; nil where it is explicit.
    private func read(_ part: Part) throws -> [Float]? {
        guard let (state, about) = part.packed else { return nil }
        let values = try state.withMultiArray(for: about.name) { try $0.floats() }
        guard values.count == about.shape.reduce(1, *) else {
            throw RWKVError.model("The packed state has \(values.count) elements, expected the shape \(about.shape).")
        }
        return values
    }

    private func write(_ values: [Float], _ part: Part) throws {
        guard let (state, about) = part.packed else { return }
        try state.withMultiArray(for: about.name) { try $0.write(values) }
    }
}

#endif
