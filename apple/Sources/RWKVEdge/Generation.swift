#if canImport(CoreML)

/// A text that is being generated: pieces of whole characters, each computed when it is asked for.
///
/// One task iterates over it, once. Whatever else the model reads between two pieces ends it with an error; its state may be copied.
public final class Generation: AsyncSequence, AsyncIteratorProtocol, @unchecked Sendable {
    /// Why a text ended: after `maxTokens`, at the model's end of text, or at a stop text.
    public enum Finish: Sendable {
        case length, end, stop
    }

    /// A state, and the text since then.
    typealias Mark = (state: Runner.Snapshot, text: String)

    /// A text that has begun.
    final class Text {
        let tokenizer: any TextTokenizer
        let stream: any TextStream
        var sampler: Sampler
        var stops: StopTexts
        /// Tokens that may still come.
        var nLeft: Int
        /// Before what may be a stop.
        var mark: Mark?
        var finish: Finish?
        private let hasStops: Bool

        init(_ generation: Generation, _ tokenizer: any TextTokenizer, after ids: [Int], occurrences: [Int: Double]?) throws {
            self.tokenizer = tokenizer
            stream = tokenizer.stream(after: ids)
            sampler = try Sampler(generation.sampling, seed: generation.seed, occurrences: occurrences)
            stops = try StopTexts(generation.stop)
            nLeft = generation.maxTokens
            hasStops = !generation.stop.isEmpty
        }

        /// Whether what was generated last may turn out to be the beginning of a stop.
        var mayGoBack: Bool { stops.isHolding || (stream.isUnfinished && hasStops) }
    }

    /// What is read first: text as it is, or the turn of a conversation.
    enum Prompt {
        case text(String)
        case turn(ChatTemplate.Turn)
    }

    let prompt: Prompt
    let maxTokens: Int
    let stop: [String]
    let sampling: Sampling
    let seed: UInt64?
    /// Touched by the model alone, on its turn; nil before the first piece is asked for.
    var text: Text?
    private let model: RWKVModel

    init(_ model: RWKVModel, prompt: Prompt, maxTokens: Int, stop: [String], sampling: Sampling, seed: UInt64?) {
        self.model = model
        self.prompt = prompt
        self.maxTokens = maxTokens
        self.stop = stop
        self.sampling = sampling
        self.seed = seed
    }

    /// Nil before the end.
    public var finish: Finish? {
        get async { await model.finish(of: self) }
    }

    public func next() async throws -> String? {
        try await model.next(of: self)
    }

    public func makeAsyncIterator() -> Generation {
        self
    }
}

#endif
