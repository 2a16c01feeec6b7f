#if canImport(CoreML)

import CoreML
import Foundation

/// Runs the step of a bundle: tokens in, logits and a state out. For one task at a time; `RWKVModel` sees to that.
final class Runner {
    private struct Function {
        let graph: Manifest.Graph
        let model: MLModel
    }

    /// A package: its two functions, and its share of the state where that is packed.
    private struct Part {
        let decode: Function
        let prefill: Function
        let packed: (state: MLState, about: Manifest.Packed)?
    }

    /// A state that can be gone back to.
    struct Snapshot {
        /// Explicit: the arrays themselves, which nobody writes to after Core ML gave them.
        fileprivate let explicit: [String: MLFeatureValue]
        /// Packed: copies, one for each part.
        fileprivate let packed: [[Float]]
        let nTokens: Int
        let logits: [Float]?
    }

    private let manifest: Manifest
    private let parts: [Part]
    /// The state that every text begins from.
    private let first: SavedState
    /// Tensor -> what a graph holds is multiplied by this to give the state.
    private let factors: [String: Float]
    /// State input -> what to hand to the next call.
    private var explicit: [String: MLFeatureValue] = [:]

    /// Tokens that the state has read.
    private(set) var nTokens = 0
    /// After the last of them; nil before the first.
    private(set) var logits: [Float]?
    /// How many tokens prefill takes in one call.
    let chunk: Int

    init(_ bundle: ModelBundle, units: MLComputeUnits, cache: URL?) async throws {
        manifest = bundle.manifest
        let graphs = manifest.graphs.sorted { $0.part < $1.part }
        var parts: [Part] = []
        // of every part there is one of each: ModelBundle has looked
        for (decode, prefill) in zip(graphs.filter { $0.function == "decode" }, graphs.filter { $0.function == "prefill" }) {
            let one = try await CompiledModels.load(decode.file, function: "decode", of: bundle, units: units, cache: cache)
            let many = try await CompiledModels.load(prefill.file, function: "prefill", of: bundle, units: units, cache: cache)
            // made once, used by both functions: the memory of a text is one
            let packed = decode.packed.map { (state: one.makeState(), about: $0) }
            parts.append(Part(decode: Function(graph: decode, model: one), prefill: Function(graph: prefill, model: many), packed: packed))
        }
        self.parts = parts
        chunk = parts[0].prefill.graph.nTokens
        factors = Dictionary(manifest.state.map { ($0.name, $0.factor) }, uniquingKeysWith: { one, _ in one })
        if let name = manifest.initialState {
            first = try SavedState(contentsOf: bundle.url(of: name), manifest: manifest)
        } else {
            first = SavedState(firstOf: manifest)
        }
        try load(nil)
    }

    /// Read tokens: `chunk` of them, or one.
    func step(_ tokens: [Int]) throws {
        if let wrong = tokens.first(where: { !(0..<manifest.spec.nVocab).contains($0) }) {
            throw RWKVError.input("Token \(wrong) is outside the vocabulary of 0 to \(manifest.spec.nVocab - 1).")
        }
        try autoreleasepool { () -> Void in
            // what goes from part to part
            var passed = ["tokens": MLFeatureValue(multiArray: try MLMultiArray.tokens(tokens))]
            var state: [String: MLFeatureValue] = [:]
            for part in parts {
                let function = tokens.count == 1 ? part.decode : part.prefill
                let graph = function.graph
                var inputs: [String: MLFeatureValue] = [:]
                for input in graph.inputs {
                    guard let value = explicit[input.name] ?? passed[input.name] else {
                        throw RWKVError.bundle("\(graph.file) takes \(input.name), which nothing gives: export the bundle again.")
                    }
                    inputs[input.name] = value
                }
                let given = try predict(function.model, inputs, part.packed?.state)
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
            guard let read = try passed["logits"]?.multiArrayValue?.floats(), read.count == manifest.spec.nVocab, state.count == explicit.count else {
                throw RWKVError.model("The model did not give the logits and the state that the manifest promises.")
            }
            // together, and only now: what fails above leaves an explicit state as it was
            explicit = state
            logits = read
            nTokens += tokens.count
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

    func snapshot() throws -> Snapshot {
        Snapshot(explicit: explicit, packed: try parts.compactMap { try read($0) }, nTokens: nTokens, logits: logits)
    }

    func restore(_ snapshot: Snapshot) throws {
        for (part, values) in zip(parts, snapshot.packed) { try write(values, part) }
        explicit = snapshot.explicit
        nTokens = snapshot.nTokens
        logits = snapshot.logits
    }

    /// Begin from a state, or with nil from where every text begins.
    func load(_ saved: SavedState?) throws {
        let saved = saved ?? first
        try saved.check(manifest)
        // as a graph holds it; that every tensor is there, and of its size, ModelBundle and `check` have seen
        func held(_ name: String) -> [Float] {
            let (values, factor) = (saved.tensors[name]?.values ?? [], factors[name] ?? 1)
            return factor == 1 ? values : values.map { $0 / factor }
        }
        var explicit: [String: MLFeatureValue] = [:]
        for part in parts {
            if let about = part.packed?.about {
                var whole = [Float](repeating: 0, count: about.shape.reduce(1, *))
                for (name, range) in about.places { whole.replaceSubrange(range, with: held(name)) }
                try write(whole, part)
            }
            for input in part.decode.graph.inputs where input.name.hasPrefix("state_") {
                let elements = held(Manifest.Graph.tensor(of: input.name))
                explicit[input.name] = MLFeatureValue(multiArray: try MLMultiArray.halves(elements, shape: input.shape))
            }
        }
        self.explicit = explicit
        nTokens = saved.nTokens
        logits = saved.logits
    }

    /// Copy the state out, as a state file has it.
    func save() throws -> SavedState {
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
        let saved = SavedState(modelID: manifest.modelID, nTokens: nTokens, tensors: tensors, logits: nTokens > 0 ? logits : nil)
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
